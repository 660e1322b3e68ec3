import pytest
import torch
from helpers import make_problem

from solvers import NM, RIA, InvalidInput, MaskProblem, PerLayer, PerRow, solve


def test_wanda_is_the_cheapest_single_removal():
    problem = make_problem(3, 8, PerRow(sparsity=0.5))
    cost = torch.empty(problem.shape, dtype=torch.float64)
    for j in range(8):
        mask = torch.ones(problem.shape, dtype=torch.bool)
        mask[:, j] = False
        cost[:, j] = problem.objective(mask)
    assert torch.equal(solve(problem, "wanda").mask, problem.pattern.round(cost))


def test_scores_worked_out_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [4.0, 1.0, -1.0, 1.0]])
    gram = torch.diag(torch.tensor([16.0, 9.0, 4.0, 1.0]))
    rows = PerRow(keep=2)
    # |W|: 1 2 3 4 / 4 1 1 1;  |W| norm: 4 6 6 4 / 16 3 2 1
    problem = MaskProblem(weight, gram, rows)
    assert solve(problem, "magnitude").mask[0].tolist() == [False, False, True, True]
    assert solve(problem, "wanda").mask.tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]
    # RI row 0: 1/5+1/10, 2/3+2/10, 3/4+3/10, 4/5+4/10, times sqrt(norm) = 2, 1.73, 1.41, 1
    expected = torch.tensor([0.3 * 2, 0.8667 * 3**0.5, 1.05 * 2**0.5, 1.2])
    assert torch.allclose(RIA().score(problem)[0], expected, atol=1e-3)
    whole = MaskProblem(weight, gram, PerLayer(keep=3))
    assert solve(whole, "wanda").mask.tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]
    groups = MaskProblem(weight, gram, NM(1, 2))
    assert solve(groups, "magnitude").mask[0].tolist() == [False, True, False, True]


def test_ria_of_empty_rows_and_columns_is_finite():
    weight = torch.zeros(2, 4)
    weight[0, 0] = 1.0
    problem = MaskProblem(weight, torch.eye(4), PerRow(keep=1))
    assert bool(torch.isfinite(RIA().score(problem)).all())
    assert bool(solve(problem, "ria").mask[0, 0])


def test_ria_takes_its_power():
    problem = make_problem(3, 8, PerRow(sparsity=0.5))
    assert torch.equal(RIA(power=0.0).score(problem), RIA(power=0.0).score(problem))
    assert not torch.equal(RIA(power=1.0).score(problem), RIA(power=0.5).score(problem))
    with pytest.raises(InvalidInput, match="power"):
        solve(problem, "ria", power=-1.0)
