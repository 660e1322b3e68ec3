"""Nothing that belongs to the process is changed by a solve, alone or beside others."""

import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import make_problem
from threadpoolctl import threadpool_info, threadpool_limits

from solvers import NM, InvalidInput, PerLayer, PerRow, available, get_solver, solve
from solvers.threads import SharedSetting, matmul_precision, one_blas_thread, quiet_warnings

SOLVERS = [info.name for info in available() if info.unavailable is None]
GPU = torch.device("cuda")


def globals_of_the_process():
    return {
        "thread pools": sorted((p["filepath"], p["num_threads"]) for p in threadpool_info()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "warnings": (id(warnings.filters), list(warnings.filters), warnings.showwarning),
        "dtype": torch.get_default_dtype(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": [np.array(part).tolist() for part in np.random.get_state()[1:]],
        "random": random.getstate(),
        "torch threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sparse checks": torch.sparse.check_sparse_tensor_invariants.is_enabled(),
        "numpy errors": np.geterr(),
    }


@pytest.fixture
def unlike_the_defaults():
    """Settings that no solver would arrive at by chance."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(3)
    with threadpool_limits(3, user_api="blas"):
        yield
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


OPTIONS = {
    "frank_wolfe": [{"dtype": dtype} for dtype in ("float32", "tfloat32", "bfloat16")],
    "semidefinite": [{"rounds": 1}, {"rounds": 1, "wide_from": 1, "batch": 1}],
    "branch_and_bound": [{"root_rounds": 5}],
    "cvxpy": [{}, {"relaxation": "sdp"}],
    "dsnot": [{"mean": [0.5] * 12}],
    "tabu": [{"iterations": 50}],
}


@pytest.mark.usefixtures("unlike_the_defaults")
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_leaves_the_process_as_it_was(solver):
    for pattern in (PerRow(keep=5), NM(2, 4), PerLayer(keep=11)):
        problem = make_problem(2, 12, pattern, "linear", seed=2)
        for options in OPTIONS.get(solver, [{}]):
            if get_solver(solver).unable(pattern) or (pattern.coupled and "relaxation" in options):
                continue
            solve(problem, solver, time_limit=20, **options)  # imports and compilation
            before = globals_of_the_process()
            alone = solve(problem, solver, time_limit=20, **options)
            assert globals_of_the_process() == before
            with ThreadPoolExecutor(4) as pool:
                calls = [
                    pool.submit(solve, problem, solver, time_limit=20, **options) for _ in range(4)
                ]
            assert globals_of_the_process() == before
            for call in calls:
                assert torch.equal(call.result().mask, alone.mask)


@pytest.mark.usefixtures("unlike_the_defaults")
def test_several_solvers_at_once_leave_the_process_as_it_was():
    problem = make_problem(2, 12, PerRow(keep=5), seed=2)
    jobs = [
        (name, options) for name in SOLVERS for options in OPTIONS.get(name, [{}]) for _ in range(2)
    ]
    random.Random(0).shuffle(jobs)
    before = globals_of_the_process()
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(solve, problem, name, time_limit=20, **more) for name, more in jobs]
    after = globals_of_the_process()
    loaded = {path for path, _ in before["thread pools"]}  # others came with an import
    after["thread pools"] = [one for one in after["thread pools"] if one[0] in loaded]
    assert after == before
    for (name, _), call in zip(jobs, calls, strict=True):
        assert call.result().solver == name


def run_threads(count, work):
    """Many threads, whose errors count."""
    with ThreadPoolExecutor(count) as pool:
        for call in [pool.submit(work, at) for at in range(count)]:
            call.result()


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.usefixtures("unlike_the_defaults")
def test_one_blas_thread_while_anyone_holds_it():
    before = threadpool_info()
    assert 3 in blas_threads()

    def work(at):
        draw = random.Random(at)
        for _ in range(30):
            with one_blas_thread():
                time.sleep(draw.random() / 1000)
                assert blas_threads() == {1}
                with one_blas_thread():
                    assert blas_threads() == {1}
            time.sleep(draw.random() / 1000)

    run_threads(8, work)
    assert threadpool_info() == before
    with pytest.raises(InvalidInput), one_blas_thread():
        raise InvalidInput("whatever happens")
    assert threadpool_info() == before


@pytest.mark.usefixtures("unlike_the_defaults")
def test_the_last_one_out_restores_the_blas_threads_in_whatever_thread_it_is():
    before = blas_threads()
    first, last = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    with first, last:
        for one, other in ((first, last), (last, first)):
            holders = one_blas_thread(), one_blas_thread()
            for pool, holder in zip((one, other), holders, strict=True):
                pool.submit(holder.__enter__).result()
                assert blas_threads() == {1}
            one.submit(holders[0].__exit__, None, None, None).result()
            assert other.submit(blas_threads).result() == {1}
            other.submit(holders[1].__exit__, None, None, None).result()
            assert blas_threads() == before


@pytest.mark.usefixtures("unlike_the_defaults")
def test_the_precision_that_is_held_is_in_force():
    def work(at):
        draw = random.Random(at)
        for _ in range(200):
            name = draw.choice(["highest", "high", "medium"])
            with matmul_precision(name, GPU):
                assert torch.get_float32_matmul_precision() == name
                time.sleep(draw.random() / 10000)
                assert torch.get_float32_matmul_precision() == name

    run_threads(8, work)
    assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(InvalidInput), matmul_precision("medium", GPU):
        raise InvalidInput("whatever happens")
    assert torch.get_float32_matmul_precision() == "high"


def test_the_precision_is_left_alone_where_there_is_no_other(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    with matmul_precision("medium", torch.device("cpu")):
        pass
    with matmul_precision(torch.get_float32_matmul_precision(), GPU):
        pass
    assert told == []


def test_warnings_are_quiet_while_anyone_holds_them():
    before, held = list(warnings.filters), warnings.filters

    def work(at):
        draw = random.Random(at)
        for _ in range(200):
            with quiet_warnings("so it is"):
                time.sleep(draw.random() / 10000)
                warnings.warn("so it is said", UserWarning, stacklevel=1)

    run_threads(8, work)
    assert warnings.filters is held
    assert warnings.filters == before
    with pytest.raises(UserWarning, match="so it is"):  # the suite makes errors of warnings
        warnings.warn("so it is said", UserWarning, stacklevel=1)


@pytest.mark.parametrize("first_out", ["quiet", "caught"])
def test_quiet_warnings_overlap_with_catch_warnings(first_out):
    before, held = list(warnings.filters), warnings.filters
    quiet, caught = quiet_warnings("something"), warnings.catch_warnings()
    quiet.__enter__()
    caught.__enter__()
    for one in (quiet, caught) if first_out == "quiet" else (caught, quiet):
        one.__exit__(None, None, None)
    assert warnings.filters is held
    assert warnings.filters == before
    caught, quiet = warnings.catch_warnings(), quiet_warnings("something")
    caught.__enter__()
    quiet.__enter__()
    for one in (caught, quiet) if first_out == "caught" else (quiet, caught):
        one.__exit__(None, None, None)
    assert warnings.filters is held
    assert warnings.filters == before


def test_a_change_that_fails_is_not_held():
    ready = threading.Event()
    undone = []

    def change():
        if not ready.is_set():
            raise InvalidInput("not yet")
        return lambda: undone.append(True)

    setting = SharedSetting(change)
    with pytest.raises(InvalidInput), setting.held():
        pass
    ready.set()
    with setting.held(), setting.held():
        assert undone == []
    assert undone == [True]
