import numpy as np
import pytest
import torch

from solvers import InvalidInput, MaskProblem, PerRow, solve

HALF = PerRow(sparsity=0.5)
WEIGHT = np.random.default_rng(0).integers(-4, 5, size=(3, 4)) / 2
INPUTS = np.random.default_rng(1).integers(-3, 4, size=(4, 9)) / 4
GRAM = INPUTS @ INPUTS.T
DIAGONAL = np.diag([4.0, 2.0, 1.0, 0.5])
KEPT = np.arange(12).reshape(3, 4) % 2 == 0


def read_only(array):
    array.setflags(write=False)
    return array


def column_slice(array):
    wide = np.zeros((2 * array.shape[0], 3 * array.shape[1]), array.dtype, order="F")
    wide[::2, ::3] = array
    return wide[::2, ::3]


def turned_round(array):
    return array[::-1, ::-1].copy()[::-1, ::-1]


SAME = {
    "float16": lambda a: a.astype(np.float16),
    "float32": lambda a: a.astype(np.float32),
    "long double": lambda a: a.astype(np.longdouble),
    "big endian": lambda a: a.astype(">f8"),
    "big endian float32": lambda a: a.astype(">f4"),
    "negative strides": turned_round,
    "strided": column_slice,
    "transposed": lambda a: a.T.copy().T,
    "read-only": lambda a: read_only(a.copy()),
    "masked, nothing left out": lambda a: np.ma.array(a, mask=False),
    "matrix": np.asmatrix,
    "lists": lambda a: a.tolist(),
    "list of arrays": list,
    "list of tensors": lambda a: list(torch.tensor(a)),
    "float8": lambda a: torch.tensor(a).to(torch.float8_e5m2),
    "bfloat16": lambda a: torch.tensor(a).bfloat16(),
    "half": lambda a: torch.tensor(a).half(),
    "sparse": lambda a: torch.tensor(a).to_sparse(),
    "sparse rows": lambda a: torch.tensor(a).to_sparse_csr(),
    "parameter": lambda a: torch.nn.Parameter(torch.tensor(a)),
    "transposed tensor": lambda a: torch.tensor(a).T.contiguous().T,
}
SMALL = ("float32", "big endian float32", "float8", "bfloat16", "half")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", SAME)
def test_arrays_of_every_kind_are_the_same_problem(kind):
    plain = MaskProblem(WEIGHT, DIAGONAL, HALF, WEIGHT)
    held = MaskProblem(*(SAME[kind](part) for part in (WEIGHT, DIAGONAL)), HALF, SAME[kind](WEIGHT))
    kinds = {held.weight.dtype, held.gram.dtype}
    assert kinds == {torch.float32 if kind in SMALL else torch.float64}
    assert not held.weight.requires_grad
    for name in ("weight", "gram", "linear"):
        assert torch.equal(getattr(held, name).double(), getattr(plain, name))
    assert torch.equal(held.objective(KEPT), plain.objective(KEPT))


def test_whole_numbers_are_taken():
    for kind in (np.int64, np.uint8, ">i2"):
        one = np.ones((2, 4), kind)
        problem = MaskProblem(one, np.eye(4, dtype=kind), HALF, one)
        assert {problem.weight.dtype, problem.gram.dtype, problem.linear.dtype} == {torch.float64}
        assert problem.objective(np.zeros((2, 4), bool)).tolist() == [8.0, 8.0]
    assert MaskProblem(torch.ones(2, 4).int(), torch.eye(4), HALF).weight.dtype == torch.float64


NO_NUMBERS = {
    "bool": (WEIGHT > 0, "has type bool; give real numbers"),
    "bool tensor": (torch.tensor(WEIGHT > 0), r"has type torch\.bool; give real numbers"),
    "complex": (WEIGHT + 0j, "has type complex128; give real numbers"),
    "complex tensor": (torch.tensor(WEIGHT + 0j), r"has type torch\.complex128"),
    "object": (WEIGHT.astype(object), "has type object; give real numbers"),
    "text": ([["1", "2"]], "has type <U1; give real numbers"),
    "dates": (WEIGHT.astype("M8[s]"), r"has type datetime64\[s\]"),
    "masked": (np.ma.array(WEIGHT, mask=WEIGHT > 1), "masked array with values left out"),
    "ragged": ([[1.0, 2.0], [3.0]], "no array of numbers .*; give rows of one length"),
    "nothing": (None, "is None, not an array; give a matrix"),
    "a number": (3.0, r"is 3\.0, not an array; give a matrix"),
    "a word": ("abc", "is 'abc', not an array; give a matrix"),
    "a set": ({1.0}, r"is \{1\.0\}, not an array; give a matrix"),
    "meta": (torch.zeros(3, 4, device="meta"), "on the meta device, without values"),
    "vector": (WEIGHT[0], "must be a non-empty matrix"),
    "long double": (np.full((3, 4), np.longdouble("1e4000")), "NaN or infinite"),
    "huge": (np.full((3, 4), 1e150), r"values above 1e\+\d+, first in row 0; scale it down"),
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_what_is_no_matrix_of_real_numbers_is_refused(kind):
    values, message = NO_NUMBERS[kind]
    for arguments, name in (
        ((values, GRAM, HALF), "weight"),
        ((WEIGHT, values, HALF), "gram"),
        ((WEIGHT, GRAM, HALF, values), "linear"),
    ):
        if name != "linear" or values is not None:
            with pytest.raises(InvalidInput, match=f"{name} .*{message}") as refusal:
                MaskProblem(*arguments)
            assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_that_hold_no_plain_numbers_are_refused():
    quantised = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for values, message in ((quantised, "is quantised; give"), (nested, "is a nested tensor")):
        with pytest.raises(InvalidInput, match=f"weight {message}"):
            MaskProblem(values, GRAM, HALF)


def test_what_is_no_pattern_is_refused():
    for pattern in (0.5, "2:4", None, PerRow):
        with pytest.raises(InvalidInput, match="is no pattern; give one such as"):
            MaskProblem(WEIGHT, GRAM, pattern)


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_a_problem_owns_its_tensors(make):
    given = make(WEIGHT), make(GRAM), make(WEIGHT)
    problem = MaskProblem(*given[:2], HALF, given[2])
    before = problem.objective(KEPT)
    for part in given:
        part[:] = -5
    assert torch.equal(problem.objective(KEPT), before)


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_a_problem_may_share_the_memory(make):
    given = make(WEIGHT), make(GRAM), make(WEIGHT)
    problem = MaskProblem(*given[:2], HALF, given[2], copy=False)
    for part, held in zip(given, (problem.weight, problem.gram, problem.linear), strict=True):
        part[0, 0] = 77.0
        assert float(held[0, 0]) == 77.0


MASKS = {
    "array": lambda m: m.copy(),
    "negative strides": turned_round,
    "strided": column_slice,
    "read-only": lambda m: read_only(m.copy()),
    "lists": lambda m: m.tolist(),
    "matrix": np.asmatrix,
    "masked, nothing left out": lambda m: np.ma.array(m, mask=False),
    "sparse": lambda m: torch.tensor(m).to_sparse(),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_are_the_same_mask(kind):
    problem = MaskProblem(WEIGHT, GRAM, HALF)
    assert torch.equal(problem.as_mask(MASKS[kind](KEPT)), torch.tensor(KEPT))
    begun = solve(problem, "swap", start=MASKS[kind](KEPT))
    assert torch.equal(begun.mask, solve(problem, "swap", start=torch.tensor(KEPT)).mask)


NO_MASKS = (
    *(KEPT.astype(kind) for kind in (int, float, object)),
    *(torch.tensor(KEPT).byte(), np.ma.array(KEPT, mask=KEPT)),
    *([[True], [True, False]], {1}, 1.0),
)


@pytest.mark.parametrize("mask", NO_MASKS)
def test_what_is_no_mask_is_refused(mask):
    problem = MaskProblem(WEIGHT, GRAM, HALF)
    for call in (problem.as_mask, problem.objective, lambda m: solve(problem, "swap", start=m)):
        with pytest.raises(InvalidInput, match=r"A mask (must be boolean|is)"):
            call(mask)


def test_a_start_is_a_mask_a_name_or_a_solution():
    problem = MaskProblem(WEIGHT, GRAM, HALF)
    wanda = solve(problem, np.str_("wanda"))
    expected = solve(problem, "swap", start=wanda.mask)
    for start in (wanda, "wanda", np.str_("wanda")):
        assert torch.equal(solve(problem, "swap", start=start).mask, expected.mask)
    for wrong in (None, 3, ["wanda"]):
        with pytest.raises(InvalidInput, match="There is no solver"):
            solve(problem, wrong)


def test_rows_are_chosen_by_number_or_by_bools():
    problem = MaskProblem(WEIGHT, GRAM, HALF)
    for index in ([0, 2], np.array([0, -1]), torch.tensor([0, 2]), slice(0, 3, 2), range(0, 3, 2)):
        assert torch.equal(problem.rows(index).weight, problem.weight[[0, 2]])
    for chosen in ([True, False, True], np.array([1, 0, 1], bool), torch.tensor([1, 0, 1]).bool()):
        assert torch.equal(problem.rows(chosen).weight, problem.weight[[0, 2]])
    assert torch.equal(problem.rows(np.array([0, 1, 2])[::-1]).weight, problem.weight.flip(0))
    assert problem.rows(1).shape == (1, 4)
    for wrong in ([0.0], np.array([1.5]), [True], [False] * 3, [], [3], "1", None, [[0], [1, 2]]):
        with pytest.raises(InvalidInput, match=r"choice from 0\.\.2: whole numbers, or one bool"):
            problem.rows(wrong)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["wanda", "ria", "magnitude", "swap", "frank_wolfe", "tabu"])
def test_objectives_of_the_largest_values_are_finite(kind, solver):
    def full(shape, most):
        return torch.full(shape, min(most, torch.finfo(kind).max), dtype=kind)

    problem = MaskProblem(full((2, 6), 1e70), full((6, 6), 1e140), HALF, full((2, 6), 1e140))
    assert bool(problem.scale().isfinite().all())
    assert bool(problem.output_energy().isfinite().all())
    assert bool(solve(problem, solver).objective.isfinite().all())


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_saliencies_of_extreme_sizes_order_as_others_do(size):
    random = np.random.default_rng(0)
    weight, norms = random.normal(size=(4, 20)), random.uniform(1, 2, size=20)
    plain = MaskProblem(weight, np.diag(norms), HALF)
    extreme = MaskProblem(
        (weight * size).astype(np.float32), (np.diag(norms) * size).astype(np.float32), HALF
    )
    for name in ("wanda", "ria", "magnitude"):
        assert torch.equal(solve(extreme, name).mask, solve(plain, name).mask)


def test_inputs_whose_mean_square_underflows_are_dead():
    inputs = np.random.default_rng(0).normal(size=(6, 50))
    inputs[1] *= 1e-22  # mean square 1e-44: below the normal numbers of float32
    inputs[4] *= 1e-30  # 0 in float32, while products with other inputs are not
    gram = torch.tensor(inputs @ inputs.T / 50).float()
    assert float(gram[4, 4]) == 0.0 < float(gram[4, 0].abs())
    problem = MaskProblem(np.ones((2, 6)), gram, HALF)
    dead = torch.tensor([False, True, False, False, True, False])
    assert torch.equal(problem.gram, gram.masked_fill(dead | dead[:, None], 0.0))
    assert problem.objective((~dead).expand(2, 6)).tolist() == [0.0, 0.0]
    assert bool(MaskProblem(np.ones((2, 6)), inputs @ inputs.T / 50, HALF).gram[1].all())


def test_gram_matrices_beyond_their_diagonal_are_refused():
    gram = np.eye(4, dtype=np.float32) * 1e-30
    gram[0, 1] = gram[1, 0] = 1e20
    with pytest.raises(InvalidInput, match="not positive semi-definite"):
        MaskProblem(WEIGHT, gram, HALF)
    gram = np.eye(4, dtype=np.float32)
    gram[1, 1], gram[0, 1], gram[1, 0] = 1e-39, 1e-10, 1e-10
    with pytest.raises(InvalidInput, match="not positive semi-definite"):
        MaskProblem(WEIGHT, gram, HALF)
