import numpy as np
import pytest
import torch
from helpers import make_problem, problems, random_mask
from hypothesis import given
from safetensors.torch import save_file

from solvers import NM, InvalidInput, MaskProblem, PerRow

HALF = PerRow(sparsity=0.5)


@given(problems())
def test_objective_is_its_definition(problem):
    mask = random_mask(problem)
    weight, gram = problem.weight.double().numpy(), problem.gram.double().numpy()
    for r, loss in enumerate(problem.objective(mask)):
        x = 1.0 - mask[r].double().numpy()
        expected = x @ np.diag(weight[r]) @ gram @ np.diag(weight[r]) @ x
        if problem.linear is not None:
            expected += problem.linear[r].numpy() @ x
        assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12 * np.abs(gram).max())


def test_objective_is_the_change_of_the_output():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 50, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    problem = MaskProblem(weight, inputs @ inputs.T / 50, HALF)
    mask = random_mask(problem)
    change = weight @ inputs - (weight * mask) @ inputs
    assert torch.allclose(problem.objective(mask), change.square().sum(dim=1) / 50)
    assert torch.allclose(problem.output_energy(), (weight @ inputs).square().sum(dim=1) / 50)


def test_save_and_load(tmp_path):
    problem = make_problem(3, 8, NM(2, 4), kind="linear")
    problem.save(tmp_path / "deep" / "layer.safetensors")
    again = MaskProblem.load(tmp_path / "deep" / "layer.safetensors", NM(2, 4))
    assert torch.equal(again.weight, problem.weight)
    assert torch.equal(again.gram, problem.gram)
    assert torch.equal(again.linear, problem.linear)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["layer.safetensors"]


def test_rows_are_the_same_problem_on_some_rows():
    problem = make_problem(5, 8, HALF, kind="linear")
    mask = random_mask(problem)
    part = problem.rows([0, 3])
    assert torch.equal(part.objective(mask[[0, 3]]), problem.objective(mask)[[0, 3]])
    assert problem.rows(slice(1, 3)).shape == (2, 8)
    for wrong in ([], [5], [-6]):
        with pytest.raises(InvalidInput, match=r"0\.\.4"):
            problem.rows(wrong)


GOOD = np.eye(4)
INDEFINITE = np.eye(4)
INDEFINITE[0, 1] = INDEFINITE[1, 0] = 2.0
UNSYMMETRIC = np.eye(4)
UNSYMMETRIC[0, 1] = 0.5
HIDDEN = np.diag([1.0, 1.0, 1e-6, 1e-6])  # indefinite only in its two small inputs
HIDDEN[2, 3] = HIDDEN[3, 2] = 2e-6
NEGATIVE = np.diag([1.0, -1.0, 1.0, 1.0])
DEAD_BUT_CORRELATED = np.diag([1.0, 0.0, 1.0, 1.0])
DEAD_BUT_CORRELATED[0, 1] = DEAD_BUT_CORRELATED[1, 0] = 0.1
NAN = np.full((4, 4), np.nan)


@pytest.mark.parametrize(
    ("weight", "gram", "pattern", "linear", "message"),
    [
        (NAN, GOOD, HALF, None, "weight has NaN or infinite values, first in row 0"),
        (GOOD + np.inf, GOOD, HALF, None, "weight has NaN or infinite"),
        (GOOD, NAN, HALF, None, "gram has NaN or infinite"),
        (GOOD, GOOD, HALF, NAN, "linear has NaN or infinite"),
        (GOOD, INDEFINITE, HALF, None, "not positive semi-definite beyond rounding"),
        (GOOD, HIDDEN, HALF, None, "not positive semi-definite beyond rounding"),
        (GOOD, NEGATIVE, HALF, None, "negative diagonal entry at input 1"),
        (GOOD, DEAD_BUT_CORRELATED, HALF, None, "zero diagonal but a non-zero row at input 1"),
        (GOOD, UNSYMMETRIC, HALF, None, "not symmetric"),
        (GOOD, np.eye(3), HALF, None, r"shape \(3, 3\) but the weight has 4 inputs"),
        (GOOD[0], GOOD, HALF, None, "must be a non-empty matrix"),
        (np.zeros((0, 4)), GOOD, HALF, None, "must be a non-empty matrix"),
        (GOOD, GOOD, HALF, np.ones((2, 4)), "must match the weight"),
        (GOOD, GOOD, NM(1, 3), None, "divisible by 3, but this layer has 4"),
        (GOOD, GOOD, PerRow(keep=5), None, "keeps 5 of 4 weights"),
    ],
)
def test_what_cannot_be_worked_with_is_refused(weight, gram, pattern, linear, message):
    with pytest.raises(InvalidInput, match=message):
        MaskProblem(weight, gram, pattern, linear)


def test_rounding_errors_of_a_float32_gram_are_accepted():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 40, generator=generator) * torch.logspace(-4, 3, 300)[:, None]
    gram = inputs @ inputs.T  # rank 40 of 300, so eigenvalues below zero by rounding
    assert float(torch.linalg.eigvalsh(gram).min()) < 0
    gram[3, 5] *= 1 + 1e-6
    problem = MaskProblem(torch.ones(2, 300), gram, HALF)
    assert torch.equal(problem.gram, problem.gram.T)


def test_masks_that_do_not_fit_are_refused():
    problem = make_problem(2, 4, HALF)
    with pytest.raises(InvalidInput, match="must be boolean"):
        problem.objective(torch.ones(2, 4))
    with pytest.raises(InvalidInput, match=r"must be \(2, 4\)"):
        problem.objective(torch.ones(2, 5, dtype=torch.bool))


def test_files_that_are_no_problem_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no problem file"):
        MaskProblem.load(tmp_path / "missing.safetensors", HALF)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InvalidInput, match="not a readable safetensors file"):
        MaskProblem.load(tmp_path / "text", HALF)
    save_file({"weight": torch.eye(4)}, tmp_path / "half.safetensors")
    with pytest.raises(InvalidInput, match="lacks the tensor 'gram'"):
        MaskProblem.load(tmp_path / "half.safetensors", HALF)
