import dataclasses

import numpy as np
import pytest
from helpers import KINDS, make_problem, optimum

from solvers import NM, PerLayer, PerRow, solve
from solvers.certificate import (
    CUTS,
    InvalidCertificate,
    check,
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
    ],
)
def test_planted_corruptions_are_rejected(case, name):
    problem, certificates, _ = case
    wrong = corrupted(certificates[1], name)
    with pytest.raises(InvalidCertificate):
        check(problem, [wrong])


def test_files_that_are_no_certificates_are_refused(case, tmp_path):
    with pytest.raises(InvalidCertificate, match="no certificates at"):
        load_certificates(tmp_path / "missing")
    (tmp_path / "text").write_text("?")
    with pytest.raises(InvalidCertificate, match="no file of certificates"):
        load_certificates(tmp_path / "text")


@pytest.fixture(scope="module")
def layer():
    problem = make_problem(4, 10, PerLayer(sparsity=0.6), seed=4)
    solution = solve(problem, "semidefinite", decompose=True)
    return problem, list(solution.certificates), solution


def test_a_layer_with_one_budget_is_certified_by_its_rows(layer, tmp_path):
    problem, certificates, solution = layer
    verified = check(problem, certificates)
    assert sum(row.objective for row in verified) == pytest.approx(float(solution.objective.sum()))
    total = sum(row.bound for row in verified)
    assert total == pytest.approx(float(solution.bound.sum()), rel=1e-7)
    assert len({c.price for c in certificates}) == 1
    save_certificates(tmp_path / "c.safetensors", certificates)
    assert check(problem, load_certificates(tmp_path / "c.safetensors")) == verified


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
