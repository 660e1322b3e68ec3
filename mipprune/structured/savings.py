"""What a budget asks for, and what removing groups saves of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from solvers import InvalidInput, removed_count

from .coupling import WORDS, Kind, Options, empty_model


@dataclass(frozen=True)
class Savings:
    """What has to be saved, and what counts save, in whole units.

    Attributes
    ----------
    target
        At least.
    amounts
        By kind: of each count considered.
    measured
        What decided, if it was measured; for the record.
    """

    target: int
    amounts: dict[Kind, list[int]]
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parameters:
    """A share of the model's parameters to keep at most.

    Parameters
    ----------
    share
        In (0, 1).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"Share {self.share} of the parameters is outside (0, 1).")

    def savings(self, model: Any, options: dict[Kind, Options], add_biases: bool) -> Savings:
        """In parameters; biases that will be added have to be saved besides.

        Raises
        ------
        InvalidInput
            If not so many can go.
        """
        total = sum(one.numel() for one in model.parameters())
        target = total - removed_count(total, self.share) + (_added(model) if add_biases else 0)
        each = {kind: parameters_each(model, one) for kind, one in options.items()}
        amounts = {
            kind: [each[kind] * (one.counts[0] - count) for count in one.counts]
            for kind, one in options.items()
        }
        most = sum(of_kind[-1] for of_kind in amounts.values())
        if target > most:
            raise InvalidInput(
                f"At most {most / total:.1%} of the parameters can go with the "
                f"{' and '.join(WORDS[kind] for kind in options)}; keep at least "
                f"{1 - most / total:.3f}."
            )
        return Savings(target, amounts)


def _added(model: Any) -> int:
    """Parameters of all biases that the configuration can add; no fewer than will be added."""
    built = empty_model(model, {}, get_args(Kind))
    there = {name for name, _ in model.named_parameters()}
    return sum(one.numel() for name, one in built.named_parameters() if name not in there)


def parameters_each(model: Any, options: Options) -> int:
    """Parameters of one group, summed over the blocks."""
    total = 0
    for one in (one for block in options.couplings for one in block):
        block = model.get_submodule(one.block_name)
        total += sum(block.get_parameter(name).numel() for name in one.parts) // one.count
    return total
