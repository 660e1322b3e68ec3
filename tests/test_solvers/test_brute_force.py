"""Every solver against enumeration, on instances that are drawn anew every time.

Without more ado for a few seconds; `make test-random` takes a minute. A failure prints the seed,
and `MIPPRUNE_SEED=<seed>` repeats it.
"""

import os
import time
from dataclasses import replace

import instances
import numpy as np
import pytest
import torch

from solvers import Evidence, Status, available, solve

SECONDS = float(os.environ.get("MIPPRUNE_RANDOM_SECONDS", "5"))
SEED = os.environ.get("MIPPRUNE_SEED")


def complaint(contender, instance, *, with_start):
    """What is wrong, in a sentence that says how to see it again; None if nothing is."""
    found = instances.judge(contender, instance, with_start=with_start).violations
    if not found:
        return None
    return (
        f"MIPPRUNE_SEED={instance.seed}: solver {contender.label!r}, pattern "
        f"{instance.pattern!r} ({instance.problem.pattern}), kind {instance.kind!r}, "
        f"{'with' if with_start else 'without'} a start: {'; '.join(found)}"
    )


def try_all(seed, until=float("inf")):
    """All contenders whose turn it is on the instance of a seed."""
    instance = instances.draw(seed)
    for contender in instances.CONTENDERS:
        if contender.meets(instance):
            message = complaint(contender, instance, with_start=seed % 3 == 0)
            if message is not None:
                print(message)
                pytest.fail(message)
            if time.perf_counter() > until:
                return


def test_solvers_on_instances_drawn_anew():
    if SEED is not None:
        try_all(int(SEED))
        return
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        try_all(int.from_bytes(os.urandom(4), "little"), until)


@pytest.mark.parametrize("kind", instances.KINDS)
def test_every_kind_by_the_quick_solvers(kind):
    for at, pattern in enumerate(instances.PATTERNS):
        instance = instances.draw(at, kind, pattern)
        for contender in instances.CONTENDERS:
            if contender.label in ("wanda", "swap") and contender.takes(instance):
                assert complaint(contender, instance, with_start=True) is None


def test_every_solver_contends():
    names = {contender.name for contender in instances.CONTENDERS}
    assert names == {info.name for info in available()}


FORGERIES = {
    "the objective is not the problem's": lambda s: {"objective": s.objective * (1 + 1e-12)},
    "above the optimum": lambda s: {"bound": s.objective * (1 + 1e-13)},
    "a bound without evidence": lambda s: {"evidence": None},
    "a bound of shape": lambda s: {"bound": s.bound.sum().reshape(1)},
    "optimal with bound": lambda s: {"bound": s.bound * (1 - 2e-4)},
    "no limit, but TIME_LIMIT": lambda s: {"status": Status.TIME_LIMIT},
    "certified without a certificate": lambda s: {"evidence": Evidence.CERTIFIED},
    "the mask is not allowed": lambda s: {"mask": torch.ones_like(s.mask)},
}


@pytest.mark.parametrize("sentence", FORGERIES)
def test_what_is_wrong_is_found(monkeypatch, sentence):
    instance = next(
        one for one in (instances.draw(s, "plain", "2:4") for s in range(99)) if len(one.units) == 3
    )
    contender = instances.Contender("branch_and_bound", "branch_and_bound")
    assert instances.judge(contender, instance).violations == []
    honest = solve(instance.problem, "branch_and_bound")
    forged = replace(honest, **FORGERIES[sentence](honest))
    monkeypatch.setattr(instances, "solve", lambda *arguments, **options: forged)
    assert any(sentence in found for found in instances.judge(contender, instance).violations)


def test_a_certificate_that_is_forged_and_a_start_made_worse_are_found(monkeypatch):
    instance = instances.draw(0, "plain", "2:4")
    contender = instances.Contender("semidefinite", "semidefinite")
    honest = solve(instance.problem, "semidefinite")
    first = honest.certificates[0]
    forged = replace(honest, certificates=(replace(first, bound=2 * abs(first.bound) + 1),))
    monkeypatch.setattr(instances, "solve", lambda *arguments, **options: forged)
    assert "a certificate is refused" in " ".join(instances.judge(contender, instance).violations)
    worst = torch.from_numpy(
        np.concatenate([unit.masks[unit.loss.argmax()] for unit in instance.units])
    )
    worse = replace(honest, mask=worst, objective=instance.problem.objective(worst))
    monkeypatch.setattr(instances, "solve", lambda *arguments, **options: worse)
    found = instances.judge(contender, instance, with_start=True).violations
    assert "was made worse" in " ".join(found)
