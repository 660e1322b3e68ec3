"""Our solvers inside llm-compressor, as one of its modifiers.

Needs ``pip install 'mipprune[llmcompressor]'``. llm-compressor calls the modifier with every
layer's inputs and after every block; here as elsewhere a layer's rows become a `MaskProblem`. Two
things are its own and not ours: N:M there counts the weights *removed* of each group, and its
tracing decides what a block is called with. GPT-2's ``Conv1D`` layers are none of its targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from solvers import NM, InvalidInput, MaskProblem, Pattern, PerRow, get_solver, solve
from solvers.registry import DEFAULT_START

try:
    from compressed_tensors.utils import align_module_device, update_offload_parameter
    from llmcompressor.core import State
    from llmcompressor.modifiers.factory import ModifierFactory
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise ImportError(
        f"mipprune.llmcompressor needs llm-compressor 0.14 ({error}): "
        "pip install 'mipprune[llmcompressor]'."
    ) from error


class SolverPruningModifier(SparsityModifierBase):  # type: ignore[misc]
    """Prunes linear layers by a solver of this project.

    ``sparsity``, ``mask_structure``, ``targets`` and ``ignore`` are llm-compressor's: a sparsity
    is that of each row, and ``mask_structure="3:4"`` *removes* 3 of every 4 inputs.

    Attributes
    ----------
    solver, start
        Names out of `solvers.available`; a start of None leaves it to the solver.
    solver_options
        The solver's own options.
    seed
        Of whatever the solver draws at random.

    Examples
    --------
    >>> modifier = SolverPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"])  # doctest: +SKIP
    >>> oneshot(model=model, dataset=data, recipe=[modifier])  # doctest: +SKIP
    >>> save_masks("masks.safetensors", modifier.masks)  # doctest: +SKIP
    """

    solver: str = "swap"
    start: str | None = None
    solver_options: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    _gram: dict[nn.Module, Tensor] = PrivateAttr(default_factory=dict)
    _tokens: dict[nn.Module, int] = PrivateAttr(default_factory=dict)
    _masks: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _loss: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)

    @property
    def masks(self) -> dict[str, Tensor]:
        """By layer: bool ``[outputs, inputs]``, True = keep."""
        return self._masks

    @property
    def losses(self) -> dict[str, tuple[float, float]]:
        """By layer: the loss of the start (of its own for a solver without one) and of the mask."""
        return self._loss

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Refuse what cannot work before any data is read."""
        get_solver(self.solver, **self.solver_options)
        self._pattern(0.5 if self.sparsity is None else self.sparsity)
        return bool(super().on_initialize(state, **kwargs))

    def calibrate_module(
        self, module: nn.Module, args: tuple[Tensor, ...], _output: Tensor
    ) -> None:
        """Add the inputs of one forward to the layer's Gram matrix (float64)."""
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        product = (x.T @ x).double()
        if module in self._gram:
            self._gram[module] += product
        else:
            self._gram[module] = product
        self._tokens[module] = self._tokens.get(module, 0) + len(x)

    def compress_modules(self) -> None:
        """Solve the layers that have been calibrated, and write their weights."""
        for module, total in list(self._gram.items()):
            name = self._module_names[module].rstrip(".")
            if not isinstance(module, nn.Linear):
                raise InvalidInput(
                    f"Layer {name} is a {type(module).__name__}; only linear layers can be pruned, "
                    "so put it on the ignore list."
                )
            with torch.no_grad(), align_module_device(module):
                weight = module.weight.detach()
                gram = total.to(weight.device) / self._tokens[module]
                pattern = self._pattern(self._module_sparsities[module])
                problem = MaskProblem(weight, gram, pattern, copy=False)
                start = None
                if self.start is not None or get_solver(self.solver).needs_start:
                    start = solve(problem, self.start or DEFAULT_START, seed=self.seed)
                solution = solve(
                    problem,
                    self.solver,
                    start=None if start is None else start.mask,
                    seed=self.seed,
                    **self.solver_options,
                )
                pruned = weight.masked_fill(~solution.mask, 0.0)
            update_offload_parameter(module, "weight", pruned)
            began = solution if start is None else start
            self._loss[name] = (float(began.objective.sum()), float(solution.objective.sum()))
            self._masks[name] = solution.mask.cpu()
            del self._gram[module], self._tokens[module]

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Take the hooks away."""
        if not self.ended_:
            self.on_end(state, None)
        return True

    def _pattern(self, sparsity: float | list[float] | str) -> Pattern:
        removed, group = self._prune_n or 0, self._prune_m or 0
        if group:
            return NM(keep=group - removed, group=group)
        return PerRow(sparsity=float(sparsity if not isinstance(sparsity, list) else sparsity[0]))


ModifierFactory.register("SolverPruningModifier", SolverPruningModifier)
