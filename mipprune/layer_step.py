"""What a layer step does around the solver: how masks are judged, and the weights after them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from solvers import (
    InvalidInput,
    LeastSquares,
    MaskProblem,
    Pattern,
    SparseGPTUpdate,
    unbiased_gain,
)

from .surrogate import Inputs, Surrogate, centred_inputs, retargeted

Update = Literal["none", "gain", "least_squares", "sparsegpt"]
Bias = Literal["none", "existing"]


@dataclass(frozen=True)
class Aim:
    """A layer's task, as `LayerStep.aim` states it.

    Attributes
    ----------
    step
        Without what the other attributes have taken in.
    weight
        Whose outputs the pruned layer is to give, ``[rows, d]``: its own, or one for other targets.
    inputs
        Statistics to judge by.
    dtype
        Of the layer.
    plain
        Whether masks are judged by the layer loss as it is.
    bias
        Where the bias takes up means: the mean output wanted and the mean input; else None.
    """

    step: LayerStep
    weight: Tensor
    inputs: Inputs
    dtype: torch.dtype
    plain: bool = True
    bias: tuple[Tensor, Tensor] | None = None

    def problems(self, pattern: Pattern) -> list[MaskProblem]:
        """The problems whose solutions are the layer's mask, one for each group of its rows."""
        return self.step.surrogate.problems(self.weight, self.inputs, pattern)

    def updated(self, mask: Tensor) -> Tensor:
        """The layer's new weight, zero where the mask prunes; in the layer's dtype."""
        step, weight, gram = self.step, self.weight, self.inputs.gram
        if not bool(gram.any()):  # a layer that saw nothing: there is nothing to make up for
            new = weight.masked_fill(~mask, 0.0)
        elif step.update == "gain":
            share, cross = step.surrogate.dense_targets, None
            if share > 0:
                assert self.inputs.cross is not None, "dense inputs were collected"
                cross = gram + share * (self.inputs.cross - gram)
            new = unbiased_gain(weight, gram, mask, cross)
        elif step.update == "least_squares":
            new = LeastSquares(damping=step.update_damping)(weight, gram, mask)
        elif step.update == "sparsegpt":
            new = SparseGPTUpdate(damping=step.update_damping)(weight, gram, mask)
        else:
            new = weight.masked_fill(~mask, 0.0)
        return new.to(self.dtype)

    def new_bias(self, new: Tensor, bias: Tensor | None) -> Tensor | None:
        """The bias beside a new weight, ``[rows]`` in its own dtype; None if it stays."""
        if self.bias is None or bias is None:
            return None
        wanted, mean = self.bias
        return (bias.double() + wanted - new.double() @ mean).to(bias.dtype)


@dataclass(frozen=True)
class LayerStep:
    """The choices of a layer step besides pattern and solver.

    Parameters
    ----------
    surrogate
        Variant of the layer loss that masks are chosen by.
    update
        Weights after the mask: "none"; "gain" (`unbiased_gain`: one factor per row);
        "least_squares" (`LeastSquares`: the best weights on the support); "sparsegpt"
        (`SparseGPTUpdate`). All take the plain statistics, whatever masks are judged by.
    update_damping
        Of the last two, in units of the mean diagonal of the Gram matrix; and of `retargeted`.
    bias
        "existing": a layer's bias, if it has one, takes up the mean of what was removed, and masks
        and weights are chosen by the centred Gram matrix; "none": biases stay.

    Notes
    -----
    Dense targets (`Surrogate.dense_targets`) become another weight to approximate where kept
    weights are fitted anew, so that every solver takes them; else they are the masks' linear term.
    A layer without `Inputs.cross` has its own outputs for targets.
    """

    surrogate: Surrogate = field(default_factory=Surrogate)
    update: Update = "none"
    update_damping: float = 1e-2
    bias: Bias = "none"

    def __post_init__(self) -> None:
        if self.bias not in get_args(Bias):
            raise InvalidInput(f"Bias '{self.bias}' is none of {', '.join(get_args(Bias))}.")
        if self.update not in get_args(Update):
            raise InvalidInput(
                f"Weight update '{self.update}' is none of {', '.join(get_args(Update))}."
            )
        LeastSquares(damping=self.update_damping)

    @property
    def keeps_weights(self) -> bool:
        """Whether the kept weights stay as they are."""
        return self.update == "none"

    @property
    def targets_by_masks(self) -> bool:
        """Whether dense targets are the masks' business alone, by their linear term."""
        return self.surrogate.dense_targets > 0 and self.update in ("none", "gain")

    def aim(self, weight: Tensor, inputs: Inputs, has_bias: bool = False) -> Aim:
        """What pruning is to make of a layer with this weight and these inputs."""
        share, bias = self.surrogate.dense_targets, None
        if inputs.cross is None:
            share = 0.0
        if share == 0 or not self.surrogate.stream:
            inputs = replace(inputs, gap=None, gap_mean=None)
        if self.bias == "existing" and has_bias:
            if inputs.mean is None:
                raise InvalidInput("What a bias makes up for needs the mean of the inputs.")
            wanted = weight.double() @ inputs.mean
            if share > 0:
                assert inputs.cross_mean is not None, "collected with the products"
                wanted += share * (weight.double() @ (inputs.cross_mean - inputs.mean))
                wanted += 0.0 if inputs.gap_mean is None else share * inputs.gap_mean
            bias = (wanted, inputs.mean)
            inputs = centred_inputs(inputs)
        target = weight
        if share > 0 and not self.targets_by_masks:
            target = retargeted(weight, inputs, share, self.update_damping)
            target = target.to(torch.promote_types(weight.dtype, torch.float32))
            share = 0.0
        surrogate = replace(
            self.surrogate,
            dense_targets=share,
            stream=self.surrogate.stream and share > 0,
            centre=0.0 if bias is not None else self.surrogate.centre,
        )
        plain = surrogate.plain and target is weight and bias is None
        step = replace(self, surrogate=surrogate)
        return Aim(step, target, inputs, weight.dtype, plain, bias)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> LayerStep:
        """The layer_step that `to_dict` described."""
        return cls(**{**record, "surrogate": Surrogate(**record["surrogate"])})


def parse_targets(text: str) -> tuple[float, bool]:
    """`Surrogate.dense_targets` and `Surrogate.stream` by name.

    "own": neither; "dense": all; "stream": all, and the stream; and with a colon, a share of it,
    such as "stream:0.5".
    """
    name, colon, share = text.partition(":")
    try:
        value = float(share) if colon else 1.0
    except ValueError:
        value = -1.0
    if name not in ("own", "dense", "stream") or (name == "own" and colon) or not 0 < value <= 1:
        raise InvalidInput(
            f"Targets are own, dense or stream, the latter two perhaps with a share such as "
            f"dense:0.5, not '{text}'."
        )
    return (0.0, False) if name == "own" else (value, name == "stream")
