"""Mixtures of experts: weights that hold all experts, their routers, and who sees which token.

Newer models keep the matrices of all experts in one 3-D parameter. Such a weight is pruned expert
by expert, each with the tokens that are routed to it. These are read off the products themselves:
while a block runs, every matrix product is watched, and one whose right factor lies inside a
fused parameter belongs to the expert that its address gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from solvers import InvalidInput


@dataclass(frozen=True)
class FusedWeight:
    """A parameter ``[experts, ., .]`` with one matrix per expert.

    Attributes
    ----------
    name
        Its full name in the model.
    module, key
        Whose parameter it is, and under which name.
    transposed
        Whether a matrix is stored ``[inputs, outputs]`` rather than ``[outputs, inputs]``.
    """

    name: str
    module: nn.Module
    key: str
    transposed: bool

    @property
    def tensor(self) -> Tensor:
        """The whole parameter."""
        return self.module.get_parameter(self.key).data

    def expert(self, index: int) -> Tensor:
        """View ``[outputs, inputs]`` of an expert's matrix."""
        matrix = self.tensor[index]
        return matrix.T if self.transposed else matrix

    def __len__(self) -> int:
        return len(self.tensor)


def fused_weights(module: nn.Module, name: str) -> list[FusedWeight]:
    """The fused expert weights among a module's own parameters.

    A 3-D parameter whose orientation cannot be told is not among them; it is then missing from
    the coverage.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    own = {
        key: parameter
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "bias" not in key
    }
    if not own or len({len(parameter) for parameter in own.values()}) != 1:
        return []
    transposed = _transposed(module, own)
    if transposed is None:
        return []
    return [FusedWeight(f"{name}.{key}", module, key, transposed) for key in own]


def _transposed(module: nn.Module, own: dict[str, nn.Parameter]) -> bool | None:
    """How a module's matrices lie: from what it says, or from its sizes; None if neither tells.

    `ProductWatch` confirms the answer on the products.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    for inputs, outputs in (("input_size", "output_size"), ("in_features", "out_features")):
        sizes = getattr(module, outputs, None), getattr(module, inputs, None)
        for parameter in own.values():
            if sizes[0] != sizes[1] and set(sizes) == set(parameter.shape[1:]):
                return bool(parameter.shape[1] != sizes[0])
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    for key, parameter in own.items():
        first, second = parameter.shape[1:]
        if first != second and hidden in (first, second):
            # The down projection gives hidden states; all others take them.
            return bool((first == hidden) != ("down" in key))
    return None


def all_fused_weights(block: nn.Module, prefix: str) -> list[FusedWeight]:
    """The fused expert weights of a block."""
    return [
        weight
        for name, module in block.named_modules(prefix=prefix)
        for weight in fused_weights(module, name)
    ]


def router_weights(block: nn.Module) -> set[str]:
    """Names, within the block, of the matrices that route tokens or gate whole experts.

    They are what a mixture holds beside its experts under the name of a router or gate, with one
    output per expert or a single one. They decide who computes, not what, and are a vanishing
    share of the weights: they stay dense.
    """
    found = set()
    parameters = {
        name: parameter for name, parameter in block.named_parameters() if parameter.ndim == 2
    }
    for experts, count in _mixtures(block):
        mixture = experts.rpartition(".")[0]
        prefix = f"{mixture}." if mixture else ""
        for name, parameter in parameters.items():
            inside = name.startswith(prefix) and not name.startswith(f"{experts}.")
            says_so = any(word in name.removeprefix(prefix) for word in ("router", "gate"))
            if inside and says_so and len(parameter) in (1, count) and not _is_bias(name):
                found.add(name)
    return found


def _mixtures(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Name within the block and number of experts of all their containers."""
    for name, module in block.named_modules():
        fused = fused_weights(module, name)
        if fused:
            yield name, len(fused[0])
        elif isinstance(module, nn.ModuleList) and len(module) > 1:
            yield name, len(module)


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


@contextmanager
def watched(
    weights: Sequence[FusedWeight], seen: Callable[[FusedWeight, int, Tensor], None]
) -> Iterator[None]:
    """Let mixtures compute expert by expert, and be told the inputs of each (`ProductWatch`).

    What the mixtures give differs by rounding only.
    """
    if not weights:
        yield
        return
    with ExitStack() as stack:
        for module in {id(weight.module): weight.module for weight in weights}.values():
            config: Any = getattr(module, "config", None)
            before = getattr(config, "_experts_implementation", None)
            if before is not None:
                stack.callback(setattr, config, "_experts_implementation", before)
                config._experts_implementation = "eager"
            if not hasattr(module, "is_transposed"):
                # transformers 4 has such a loop in training; these modules hold no dropout.
                stack.callback(setattr, module, "training", module.training)
                module.training = True
        stack.enter_context(ProductWatch(weights, seen))
        yield


class ProductWatch(TorchFunctionMode):
    """Tells which inputs an expert's matrix is multiplied with.

    Parameters
    ----------
    weights
        The fused weights to watch; they stay where they are meanwhile.
    seen
        Called before each product with the weight, the expert, and the inputs ``[tokens, d]``.

    Raises
    ------
    InvalidInput
        Inside, if a product uses a weight in another way than as a whole matrix of an expert.
    """

    def __init__(
        self, weights: Sequence[FusedWeight], seen: Callable[[FusedWeight, int, Tensor], None]
    ) -> None:
        super().__init__()
        self._weights = [(weight.tensor, weight) for weight in weights]
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            # linear takes its weight [outputs, inputs], the other products [inputs, outputs].
            matrix = args[1] if func is functional.linear else args[1].transpose(-1, -2)
            self._look(args[0], matrix)
        return func(*args, **kwargs)

    def _look(self, inputs: Tensor, matrix: Tensor) -> None:
        address = matrix.data_ptr()
        for tensor, weight in self._weights:
            offset = address - tensor.data_ptr()
            if not 0 <= offset < tensor.numel() * tensor.element_size():
                continue
            index, rest = divmod(offset, tensor.stride(0) * tensor.element_size())
            expected = weight.expert(index)
            whole = matrix.ndim == 3 and matrix.shape[0] == len(weight)
            one = matrix[0] if whole else matrix
            if rest or one.shape != expected.shape or one.stride() != expected.stride():
                raise InvalidInput(
                    f"The model multiplies with {weight.name} in a way that cannot be followed "
                    "expert by expert; it cannot be pruned."
                )
            if whole:
                for expert, routed in enumerate(inputs):
                    self._seen(weight, expert, routed)
            else:
                self._seen(weight, index, inputs)
            return


_PRODUCTS = {
    functional.linear,
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.__matmul__,
}
