"""Benchmark tasks through lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solvers import InvalidInput

if TYPE_CHECKING:
    from .models import LoadedModel

_SUFFIXES = (".yaml", ".yml")


def zero_shot(
    loaded: LoadedModel,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Parameters
    ----------
    loaded
        The model and its tokenizer.
    tasks
        The harness's names, or YAML files of one task each.
    shots
        Examples before each question; None leaves it to the task (mostly none).
    limit
        The first so many questions of each task, for a quick look; None for all.
    batch_size
        Requests per forward.
    seed
        Of whatever the harness draws at random.

    Returns
    -------
    dict
        "harness" (its version) and "tasks": for each its version, shots, questions, and metrics,
        named as the harness names them, with standard errors.

    Raises
    ------
    InvalidInput
        If the harness is missing, or a task is unknown or cannot be had here.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InvalidInput(
            f"Tasks need lm-evaluation-harness ({error}): pip install 'mipprune[eval]'."
        ) from None
    files = [Path(task).expanduser() for task in tasks if task.endswith(_SUFFIXES)]
    names = [task for task in tasks if not task.endswith(_SUFFIXES)]
    names += [_task_name(file) for file in files]
    manager = TaskManager(
        include_path=[str(file.parent) for file in files] or None,
        include_defaults=len(names) > len(files),
    )
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise InvalidInput(
            f"lm-evaluation-harness has no task '{unknown[0]}'; `lm_eval ls tasks` lists them."
        )
    model = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size
    )
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError) as error:
        offline = " (offline)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise InvalidInput(
            f"The tasks {', '.join(names)} cannot be run here{offline}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    return {
        "harness": lm_eval.__version__,
        "limit": limit,
        "tasks": {name: _task(name, found) for name in found["results"]},
    }


def _task(name: str, found: Any) -> dict[str, Any]:
    metrics = {
        # "acc,none" is the metric acc of unfiltered answers
        key.removesuffix(",none"): value
        for key, value in found["results"][name].items()
        if isinstance(value, float)
    }
    return {
        "version": found["versions"].get(name),
        "shots": found["n-shot"].get(name),
        "questions": found["n-samples"].get(name, {}).get("effective"),
        "metrics": metrics,
    }


def _task_name(file: Path) -> str:
    import yaml

    if not file.is_file():
        raise InvalidInput(f"There is no task file at {file}.")
    # Only the name is read here; the harness's own tags (!function) stand for nothing.
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            try:
                name = yaml.safe_load(line)["task"]
            except yaml.YAMLError:
                break
            if isinstance(name, str):
                return name
    raise InvalidInput(f"{file} is no task of lm-evaluation-harness: it has no line 'task: NAME'.")
