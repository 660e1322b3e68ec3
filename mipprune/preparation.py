"""What a run does with the dense model before the first layer is pruned.

Inputs are put in order, tokens weighted, sparsity shared out, an open option chosen: each takes a
pass of its own over the dense model. An interrupted run goes on with what its journal says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from solvers import InputOrder

from .calibration import Windows
from .choice import Chosen
from .gram import TokenWeights
from .held_out import chosen_for_model
from .journal import Finished, Journal
from .observer import Observer
from .permute import orders_of_run
from .placement import Placement
from .ranks import ALONE, Ranks
from .record import PruneReport
from .settings import Settings
from .share_out import shared_out
from .token_weights import token_weights
from .walk import HOST_BYTES, BlockWalk


@dataclass(frozen=True)
class Prepared:
    """What was found.

    Attributes
    ----------
    settings
        The run's, with the rules that share out its sparsity, and no option open for the model.
    orders
        Of inputs that were reordered, by the layer that reads them.
    weights
        What tokens count; None if all count the same.
    chosen
        The value of the option that was open for the model; None if there was none.
    """

    settings: Settings
    orders: dict[str, InputOrder] = field(default_factory=dict)
    weights: TokenWeights | None = None
    chosen: Chosen | None = None

    def note_in(self, report: PruneReport) -> None:
        """Add it to a run's record."""
        report.orders = self.orders
        report.settings["rules"] = self.settings.rules.to_dict()
        if self.chosen is not None:
            report.settings["choice"].update(self.chosen.to_dict())


def needs_preparation(settings: Settings) -> bool:
    """Whether there is anything to find before the run."""
    return (
        bool(settings.permuted)
        or settings.layer_step.surrogate.tokens != "equal"
        or settings.allocation is not None
        or settings.chooses_for_model
    )


def prepare(
    settings: Settings,
    placement: Placement,
    windows: Windows,
    apart: Windows | None,
    capture: Callable[[Windows], BlockWalk],
    finished: Finished,
    journal: Journal,
    *,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Prepared:
    """Find what a run needs, and write it to the journal; the model computes what it did.

    Parameters
    ----------
    settings
        Settled.
    placement
        The dense model. If inputs are put in order, its weights are, too.
    windows, apart
        To calibrate on, and held out.
    capture
        Makes a walk over windows.
    finished, journal
        What was found before the run was interrupted; what is found now.
    host_bytes, ranks, observer
        As of the run.
    """
    observer = observer or Observer()
    shared: dict[str, Any] = {"host_bytes": host_bytes, "ranks": ranks, "observer": observer}
    orders: dict[str, InputOrder] = {}
    if settings.permuted:
        orders = orders_of_run(settings, placement, windows, finished, journal, **shared)
    weights, surrogate = None, settings.layer_step.surrogate
    if surrogate.tokens != "equal":
        names = [layer.name for layer in settings.layers(placement)]
        weights = token_weights(surrogate, placement, lambda: capture(windows), names, observer)
    if settings.allocation is not None:
        rules = finished.rules
        if rules is None:
            rules = shared_out(settings, placement, windows, weights=weights, **shared)
            journal.allocate(rules)
        settings = replace(settings, rules=rules)
    chosen = None
    if settings.chooses_for_model:
        chosen = finished.chosen
        if chosen is None:
            assert apart is not None, "what is chosen is chosen on windows held out"
            walk, walk_apart = capture(windows), capture(apart)
            walk.token_weights = weights
            chosen = chosen_for_model(settings, walk, walk_apart, ranks=ranks, observer=observer)
            journal.choose(chosen)
        settings = settings.decided(chosen)
    return Prepared(settings, orders, weights, chosen)
