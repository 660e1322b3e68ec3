import dataclasses
import itertools
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import KINDS, make_problem, optimum
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, checker, checker_folder, solve
from solvers.certificate import (
    CUTS,
    Certificate,
    InvalidCertificate,
    check,
    check_rows,
    load_certificates,
    save_certificates,
)
from solvers.semidefinite.cuts import FAMILIES


@pytest.fixture(scope="module")
def case():
    problem = make_problem(3, 16, PerRow(sparsity=0.5), seed=2)
    solution = solve(problem, "semidefinite")
    return problem, list(solution.certificates), solution


def test_the_checker_knows_the_same_cuts():
    assert [[*p, *s, c] for p, s, c in CUTS] == FAMILIES.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.6), NM(2, 5), PerRow(keep=0)], ids=str)
def test_certificates_are_accepted_and_below_the_optimum(pattern, kind):
    problem = make_problem(2, 10, pattern, kind, seed=6)
    solution = solve(problem, "semidefinite", rounds=15)
    size = float((problem.weight**2 * problem.gram.diagonal()).sum())
    if problem.linear is not None:
        size += float(problem.linear.abs().sum())
    for verified, objective, bound in zip(
        check(problem, solution.certificates), solution.objective, solution.bound, strict=True
    ):
        assert verified.objective == pytest.approx(float(objective), rel=1e-12)
        assert verified.bound == pytest.approx(float(bound), abs=1e-8 * size)
        assert verified.bound <= optimum(problem.rows([verified.row])) + 1e-12 * size
    for verified, exact in zip(
        check(problem, solution.certificates),
        check(problem, solution.certificates, exact=True),
        strict=True,
    ):
        assert verified.bound <= exact.bound


def test_files_hold_all_of_it(case, tmp_path):
    problem, certificates, _ = case
    save_certificates(tmp_path / "c.safetensors", certificates)
    problem.save(tmp_path / "p.safetensors")
    again = load_certificates(tmp_path / "c.safetensors")
    loaded = type(problem).load(tmp_path / "p.safetensors", problem.pattern)
    assert check(loaded, again) == check(problem, certificates)


def test_gaps(case):
    problem, certificates, solution = case
    for verified, gap in zip(check(problem, certificates), solution.gap, strict=True):
        assert verified.gap == pytest.approx(float(gap), abs=1e-6)


def corrupted(certificate, name):
    """One planted error, each of another kind."""
    c = dataclasses.replace(certificate, **{
        key: value.copy() for key, value in vars(certificate).items() if hasattr(value, "copy")
    })  # fmt: skip
    strongest = int(np.argmax(c.multiplier))
    if name == "bound raised":
        return dataclasses.replace(c, bound=c.bound * 1.01)
    if name == "offset raised":
        return dataclasses.replace(c, offset=c.offset + 0.01 * abs(c.bound), bound=c.bound * 1.001)
    if name == "shift removed":
        return dataclasses.replace(c, shift=0.0, diagonal=c.diagonal * 1.05)
    if name == "shift negative":
        return dataclasses.replace(c, shift=-1e-3)
    if name == "diagonal raised":
        c.diagonal[:] += 0.1 * np.abs(c.diagonal).max()
    elif name == "multiplier negative":
        c.multiplier[strongest] = -c.multiplier[strongest]
    elif name == "multiplier raised":
        c.multiplier[strongest] += 10 * np.abs(c.diagonal).max()
    elif name == "family changed":
        c.family[:] = (c.family + 1) % len(CUTS)
    elif name == "family unknown":
        c.family[strongest] = 17
    elif name == "inputs out of range":
        c.index[strongest, 0] = 99
    elif name == "inputs exchanged":
        c.index[:] = c.index[::-1]
    elif name == "mask flipped":
        c.mask[0] = not c.mask[0]
    elif name == "number not finite":
        c.diagonal[3] = np.nan
    elif name == "cut dropped":
        keep = np.arange(len(c.family)) != strongest
        return dataclasses.replace(
            c, family=c.family[keep], index=c.index[keep], multiplier=c.multiplier
        )
    elif name == "family of floats":
        return dataclasses.replace(c, family=c.family + 0.5)
    elif name == "inputs negative":
        c.index[strongest, 0] = -1
    elif name == "multiplier a little negative":
        c.multiplier[int(np.argmin(c.multiplier))] = -1e-18
    elif name == "multipliers of single precision":
        return dataclasses.replace(c, multiplier=c.multiplier.astype(np.float32))
    elif name == "mask of numbers":
        return dataclasses.replace(c, mask=c.mask.astype(np.int8))
    elif name == "multiplier that overflows":
        c.multiplier[strongest] = 1e300
    elif name == "shift that overflows":
        return dataclasses.replace(c, shift=1e308)
    elif name == "another row":
        return dataclasses.replace(c, row=(c.row + 1) % 3)
    elif name == "no such row":
        return dataclasses.replace(c, row=7)
    return c


@pytest.mark.parametrize(
    "name",
    [
        "bound raised",
        "offset raised",
        "shift removed",
        "shift negative",
        "diagonal raised",
        "multiplier negative",
        "multiplier raised",
        "family changed",
        "family unknown",
        "inputs out of range",
        "inputs exchanged",
        "mask flipped",
        "number not finite",
        "cut dropped",
        "another row",
        "no such row",
        "family of floats",
        "inputs negative",
        "multiplier a little negative",
        "multipliers of single precision",
        "mask of numbers",
        "multiplier that overflows",
        "shift that overflows",
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_planted_corruptions_are_rejected(case, name, exact):
    problem, certificates, _ = case
    wrong = corrupted(certificates[1], name)
    with pytest.raises(InvalidCertificate):
        check(problem, [wrong], exact=exact)
    assert issubclass(InvalidCertificate, InvalidInput)


def bare(mask, **witness):
    """A certificate without cuts."""
    none = {
        "row": 0,
        "diagonal": np.zeros(len(mask)),
        "family": np.zeros(0, np.int64),
        "index": np.zeros((0, 3), np.int64),
        "multiplier": np.zeros(0),
        "shift": 0.0,
    }
    return Certificate(mask=mask, **{**none, **witness})


@pytest.mark.parametrize(("offset", "claim"), [(1e200, 9e199), (1e155, 0.9e155), (1e160, 7.0)])
def test_numbers_that_overflow_the_factor_prove_nothing(offset, claim):
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    mask = np.arange(8) < 4
    with pytest.raises(InvalidCertificate):
        check(problem, [bare(mask, offset=offset, bound=claim)])
    loss = float(problem.objective(torch.from_numpy(np.stack([mask, mask])))[0])
    hidden = bare(
        mask,
        offset=0.9995 * loss,
        bound=0.999 * loss,
        family=np.zeros(1, np.int64),
        index=np.array([[0, 1, 2]]),
        multiplier=np.array([1e155]),
    )
    with pytest.raises(InvalidCertificate):
        check(problem, [hidden])


def test_the_checker_imports_nothing_of_the_project_and_runs_by_itself(tmp_path):
    program = (
        "import sys, runpy; folder, sys.path[0] = sys.argv.pop(1), sys.argv.pop(1)\n"
        "sys.argv.append(folder)\n"
        f"try: runpy.run_path({checker_folder.__file__!r}, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "taken = [name for name in sys.modules if name.split('.')[0] in "
        "('torch', 'solvers', 'mipprune', 'scipy', 'safetensors')]\n"
        "print(code, taken)"
    )
    # A copy of the two files elsewhere is enough.
    for module in (checker, checker_folder):
        shutil.copy(module.__file__, tmp_path)
    for place in (Path(checker.__file__).parent, tmp_path):
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(place)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout == "1 []\n"
        assert "There is no file" in found.stderr


def test_the_checker_is_a_program(tmp_path):
    command = [sys.executable, checker_folder.__file__, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert "There is no file" in found.stderr


def least_shift(problem, certificate):
    """The smallest shift with which the floating-point checker accepts a witness, or near it."""
    high = 1e-30
    while not accepted(problem, dataclasses.replace(certificate, shift=high)):
        high *= 16
        assume(high < 1e30)
    low = high / 16
    for _ in range(12):
        middle = (low + high) / 2
        good = accepted(problem, dataclasses.replace(certificate, shift=middle))
        low, high = (low, middle) if good else (middle, high)
    return high


def accepted(problem, certificate):
    try:
        check(problem, [certificate])
    except InvalidCertificate:
        return False
    return True


def exact_optimum(problem):
    """By enumeration, in fractions."""
    weight = [Fraction(float(w)) for w in problem.weight[0].double()]
    gram = [[Fraction(float(g)) for g in row] for row in problem.gram.double()]
    d = len(weight)
    best = None
    for bits in itertools.product([0, 1], repeat=d):
        if problem.pattern.is_feasible(torch.tensor([bits]) == 0):
            on = [i for i in range(d) if bits[i]]
            loss = sum(weight[i] * gram[i][j] * weight[j] for i in on for j in on)
            best = loss if best is None else min(best, loss)
    return best


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    d=st.sampled_from([4, 6]),
    cell=st.booleans(),
    rank=st.integers(1, 6),
    spread=st.sampled_from([0, 3, 8]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_the_guard_is_enough(seed, d, cell, rank, spread, scale):
    """Whatever floating point accepts, balls accept, and no mask is below it."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(d, rank)) * 10.0 ** random.integers(-spread, spread + 1, (d, 1))
    weight = torch.from_numpy(random.normal(size=(1, d)) * scale)
    pattern = NM(1, 2) if cell else PerRow(keep=d // 2)
    problem = MaskProblem(weight, torch.from_numpy(inputs @ inputs.T), pattern)
    size = float(problem.scale()[0])
    mask = pattern.round(torch.from_numpy(random.random((1, d))))[0].numpy()
    cuts = int(random.integers(0, 6))
    certificate = bare(
        mask,
        bound=-1e300,
        offset=size * random.normal(),
        diagonal=size * random.normal(size=d) * random.integers(0, 2),
        family=random.integers(0, len(CUTS), cuts),
        index=random.integers(0, d, (cuts, 3)),
        multiplier=size * random.random(cuts),
    )
    found = dataclasses.replace(certificate, shift=least_shift(problem, certificate))
    (verified,) = check(problem, [found])
    claimed = dataclasses.replace(found, bound=verified.bound)
    (exact,) = check(problem, [claimed], exact=True)
    assert verified.bound <= exact.bound
    assert Fraction(exact.bound) <= exact_optimum(problem)


def test_margins_are_those_of_students_distribution():
    for freedom, quantile in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (7, 2.3646), (30, 2.0423)):
        assert checker_folder._quantile(freedom) == pytest.approx(quantile, abs=1e-4)
    gaps = np.array([0.1, 0.2, 0.3])
    assert checker_folder.margin(gaps, 3) == 0.0
    assert checker_folder.margin(gaps[:1], 3) is None
    assert checker_folder.margin(gaps, 10**9) == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)


def test_counts_are_the_checkers_own():
    assert checker.cells({"kind": "per_row", "sparsity": 0.29, "keep": None}, 3, 100) == (100, 71)
    assert checker.cells({"kind": "nm", "keep": 2, "group": 4}, 3, 8) == (4, 2)
    assert checker.cells({"kind": "per_layer", "sparsity": 0.5, "keep": None}, 3, 5) == (15, 8)
    for wrong in (
        {"kind": "nm", "keep": 2, "group": 3},
        {"kind": "per_row", "keep": 9},
        {"kind": "per_row"},
        {"kind": "linear"},
    ):
        with pytest.raises(checker.Refused):
            checker.cells(wrong, 3, 8)


def test_files_that_are_no_certificates_are_refused(case, tmp_path):
    with pytest.raises(InvalidCertificate, match="no certificates at"):
        load_certificates(tmp_path / "missing")
    (tmp_path / "text").write_text("?")
    with pytest.raises(InvalidCertificate, match="no file of certificates"):
        load_certificates(tmp_path / "text")


@pytest.fixture(scope="module")
def layer():
    problem = make_problem(3, 5, PerLayer(sparsity=0.6), seed=4)
    solution = solve(problem, "semidefinite", decompose=True)
    return problem, list(solution.certificates), solution


def test_a_layer_with_one_budget_is_certified_by_its_rows(layer, tmp_path):
    problem, certificates, solution = layer
    (verified,) = check(problem, certificates)
    assert verified.row is None
    assert verified.objective == pytest.approx(float(solution.objective.sum()))
    assert verified.bound == pytest.approx(float(solution.bound.sum()), rel=1e-7)
    assert verified.bound <= optimum(problem)
    assert verified.bound <= check(problem, certificates, exact=True)[0].bound
    shares = check_rows(problem, certificates)
    assert sum(row.bound for row in shares) == pytest.approx(verified.bound, rel=1e-14)
    assert len({c.price for c in certificates}) == 1
    save_certificates(tmp_path / "c.safetensors", certificates)
    assert check(problem, load_certificates(tmp_path / "c.safetensors")) == [verified]


def changed(certificates, name):
    """Certificates of a layer with one error in them."""
    first, *rest = certificates
    if name == "price raised in one":
        return [dataclasses.replace(first, price=first.price * 1.01), *rest]
    if name == "price raised in all":
        return [dataclasses.replace(c, price=c.price * 1.1) for c in certificates]
    if name == "price lowered in all":
        return [dataclasses.replace(c, price=c.price * 0.9) for c in certificates]
    if name == "price missing":
        return [dataclasses.replace(c, price=None) for c in certificates]
    if name == "price not finite":
        return [dataclasses.replace(c, price=float("inf")) for c in certificates]
    if name == "row dropped":
        return rest
    if name == "row doubled":
        return [first, first, *rest[1:]]
    if name == "bound raised":
        return [dataclasses.replace(first, bound=first.bound + 0.01 * abs(first.bound)), *rest]
    if name == "mask of other counts":
        mask = first.mask.copy()
        mask[np.argmax(mask)] = False
        return [dataclasses.replace(first, mask=mask), *rest]
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "price raised in one",
        "price raised in all",
        "price lowered in all",
        "price missing",
        "price not finite",
        "row dropped",
        "row doubled",
        "bound raised",
        "mask of other counts",
    ],
)
def test_corrupted_layers_are_rejected(layer, name):
    problem, certificates, _ = layer
    with pytest.raises(InvalidCertificate):
        check(problem, changed(certificates, name))


def test_a_price_is_no_excuse_for_counts_of_ones_own(case, layer):
    problem, certificates, _ = case
    with pytest.raises(InvalidCertificate, match="has a price"):
        check(problem, [dataclasses.replace(certificates[0], price=0.0)])


STRANGE = [
    None,
    "x",
    [1, 2],
    10**400,
    10**5000,
    1j,
    np.array([1.0, 2.0]),
    Fraction(1, 2),
    np.nan,
    {},
    torch.tensor([1.0]),
    torch.zeros(3, device="meta"),
    np.ma.array([1.0, 2.0], mask=[0, 1]),
    [[1], [1, 2]],
    True,
    -1,
]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Certificate)])
def test_whatever_a_certificate_holds_is_refused_in_a_sentence(case, layer, name, exact):
    for problem, certificates, _ in (case, layer):
        for value in STRANGE:
            changed = dataclasses.replace(certificates[0], **{name: value})
            if (name == "bound" and value is STRANGE[-1]) or (name == "price" and value is None):
                continue  # lower than what is proven; no price
            with pytest.raises(InvalidCertificate) as caught:
                check(problem, [changed, *certificates[1:]], exact=exact)
            assert len(str(caught.value)) < 250
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exact", [False, True])
def test_numbers_that_overflow_prove_nothing(case, exact):
    problem, certificates, _ = case
    huge = dataclasses.replace(
        certificates[0],
        offset=-1.7e308,
        family=np.array([2]),
        index=np.array([[0, 1, 2]]),
        multiplier=np.array([1.7e308]),
    )
    with pytest.raises(InvalidCertificate):
        check(problem, [huge], exact=exact)


def test_only_a_list_of_certificates_is_one(case):
    problem, certificates, _ = case
    for wrong in (None, "abc", [1, 2], 3, certificates[0], [None]):
        with pytest.raises(InvalidCertificate, match="is no"):
            check(problem, wrong)
    with pytest.raises(InvalidCertificate, match=f"Row {certificates[1].row} has 2 certificates"):
        check(problem, [*certificates, certificates[1]])
    with pytest.raises(InvalidInput, match="exact='yes' must be"):
        check(problem, certificates, exact="yes")
    assert check(problem, iter(certificates)) == check(problem, certificates)


def test_tensors_and_lists_are_arrays(case):
    problem, certificates, _ = case
    names = ("mask", "diagonal", "family", "index", "multiplier")
    as_tensors = [
        dataclasses.replace(c, **{n: torch.as_tensor(getattr(c, n)) for n in names})
        for c in certificates
    ]
    as_lists = [dataclasses.replace(c, mask=c.mask.tolist()) for c in certificates]
    assert check(problem, as_tensors) == check(problem, as_lists) == check(problem, certificates)
