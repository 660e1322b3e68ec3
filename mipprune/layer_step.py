"""What a layer step does around the solver: how masks are judged, and the weights after them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from solvers import (
    InvalidInput,
    LeastSquares,
    MaskProblem,
    Pattern,
    SparseGPTUpdate,
    unbiased_gain,
)

from .surrogate import Inputs, Surrogate

Update = Literal["none", "gain", "least_squares", "sparsegpt"]


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
        Of the last two, in units of the mean diagonal of the Gram matrix.
    """

    surrogate: Surrogate = field(default_factory=Surrogate)
    update: Update = "none"
    update_damping: float = 1e-2

    def __post_init__(self) -> None:
        if self.update not in get_args(Update):
            raise InvalidInput(
                f"Weight update '{self.update}' is none of {', '.join(get_args(Update))}."
            )
        LeastSquares(damping=self.update_damping)

    @property
    def keeps_weights(self) -> bool:
        """Whether the kept weights stay as they are."""
        return self.update == "none"

    def problem(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> MaskProblem:
        """The problem whose solution is the layer's mask."""
        return self.surrogate.problem(weight, inputs, pattern)

    def updated(self, weight: Tensor, inputs: Inputs, mask: Tensor) -> Tensor:
        """The layer's new weight, zero where the mask prunes; in the weight's dtype."""
        gram = inputs.gram
        if not bool(gram.any()):  # a layer that saw nothing: there is nothing to make up for
            return weight.masked_fill(~mask, 0.0)
        cross = inputs.cross if self.surrogate.dense_targets else None
        if self.update == "gain":
            return unbiased_gain(weight, gram, mask, cross)
        if self.update == "least_squares":
            return LeastSquares(damping=self.update_damping)(weight, gram, mask, cross)
        if self.update == "sparsegpt":
            return SparseGPTUpdate(damping=self.update_damping)(weight, gram, mask)
        return weight.masked_fill(~mask, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> LayerStep:
        """The layer_step that `to_dict` described."""
        return cls(**{**record, "surrogate": Surrogate(**record["surrogate"])})
