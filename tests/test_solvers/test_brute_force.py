"""Every solver against enumeration, on instances that are drawn anew every time.

Without more ado for a few seconds; `make test-random` takes a minute. A failure prints the seed,
and `MIPPRUNE_SEED=<seed>` repeats it.
"""

import os
import time

import instances
import pytest

from solvers import available

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
