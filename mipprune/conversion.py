"""How transformers turns stored weights into a model's own: renamed, merged, split, permuted.

Since version 5, transformers lists for each kind of model what it does to a checkpoint's weights on
loading (say, it merges the matrices of all experts into one weight), and undoes it on saving. Here
the same list is applied to one weight at a time, so that such checkpoints can be read and written
block by block. Before version 5 there is no list, and weights are stored under their own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Source:
    """The stored weights that one of the model's weights, or several, are made of.

    Attributes
    ----------
    name
        Of the first weight that is made.
    stored
        Names of the stored weights, with the pattern of the conversion that each one matched.
    converter
        What is done to them; None if nothing is.
    """

    name: str
    stored: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def make(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's weights by name; the stored ones are taken out of ``tensors``."""
        if self.converter is None:
            return {self.name: tensors.pop(self.stored[0][1])}
        converter = deepcopy(self.converter)
        for pattern, stored in self.stored:
            converter.add_tensor(self.name, stored, pattern, tensors.pop(stored))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}


class Conversion:
    """What transformers does to the stored weights of a model.

    Parameters
    ----------
    model
        Its parameters may be on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._transforms: list[Any] = []
        self._revert: Any = None
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError:
            return
        self._transforms = get_model_conversion_mapping(model)

    def sources(self, stored: Iterable[str]) -> list[Source]:
        """What the stored weights of these names become; a name may be none of the model's.

        Raises
        ------
        ImportError, AttributeError, TypeError
            If this version of transformers keeps its list in another way.
        """
        if not self._transforms:
            return [Source(name, [(name, name)]) for name in stored]
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
            revert_weight_conversion,
        )

        self._revert = revert_weight_conversion
        renamings = [x for x in self._transforms if isinstance(x, WeightRenaming)]
        converters = [x for x in self._transforms if isinstance(x, WeightConverter)]
        of_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
        own = self._model.state_dict()
        expected = (self._model.base_model_prefix, own)
        sources: dict[str, Source] = {}
        # The order is that of transformers, since it is the order of experts in a merged weight.
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, *expected)
            if name not in own and key in own:
                name, pattern = key, None
            source = sources.setdefault(name, Source(name))
            if pattern is not None:
                source.converter = of_pattern[pattern]
            source.stored.append((pattern or key, key))
        # Where from_pretrained leaves them for saving, which had no part in this.
        self._model._weight_conversions = [x for x in self._transforms if x.was_used()]
        return list(sources.values())

    def undone(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the model as they are stored, by their stored names."""
        if not self._transforms:
            return dict(tensors)
        stored = self._revert(self._model, dict(tensors))
        # Parts of a merged weight share its memory, in which they cannot be written.
        return {
            name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
            for name, x in stored.items()
        }
