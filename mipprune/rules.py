"""Which layers are pruned, and how: rules by a layer's name, the first that matches wins."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from solvers import NM, InvalidInput, Pattern, PerLayer, PerRow, pattern_from_dict

DENSE = "dense"
"""Stands for no pruning where a rule names a pattern."""

_REGEX = "re:"


@dataclass(frozen=True)
class Rules:
    r"""A pattern for every layer, or none.

    Names are matched whole and case counts. ``*`` stands for any characters, dots too
    (``*.mlp.*``), and nothing else is special; or after ``re:`` there is a regular expression
    (``re:.*\.[0-3]\.mlp\..*``).

    Attributes
    ----------
    default
        Pattern of layers that no rule names.
    rules
        Pairs (name, pattern); a pattern of None leaves the layer dense. The first match wins.
    ignore
        Layers left dense, whatever the rules say.
    only
        If there are any, all other layers are left dense.
    """

    default: Pattern
    rules: tuple[tuple[str, Pattern | None], ...] = ()
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for expression in self._expressions():
            if expression.startswith(_REGEX):
                try:
                    re.compile(expression.removeprefix(_REGEX))
                except re.error as error:
                    raise InvalidInput(
                        f"'{expression}' is no regular expression ({error})."
                    ) from None

    def pattern_for(self, layer: str) -> Pattern | None:
        """The pattern of a layer, by its full name; None if it stays dense."""
        if any(matches(one, layer) for one in self.ignore):
            return None
        if self.only and not any(matches(one, layer) for one in self.only):
            return None
        for expression, pattern in self.rules:
            if matches(expression, layer):
                return pattern
        return self.default

    def check(self, layers: Iterable[str]) -> None:
        """Refuse a rule that names no layer, and rules that leave nothing to prune.

        Raises
        ------
        InvalidInput
            It names the rule.
        """
        names = list(layers)
        for expression in self._expressions():
            if not any(matches(expression, name) for name in names):
                raise InvalidInput(
                    f"No layer is named '{expression}'; names are matched whole, such as {names[0]}"
                    ", with * for any characters."
                )
        if all(self.pattern_for(name) is None for name in names):
            raise InvalidInput("The rules leave every layer dense; there is nothing to prune.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {
            "default": self.default.to_dict(),
            "rules": [[one, pattern and pattern.to_dict()] for one, pattern in self.rules],
            "ignore": list(self.ignore),
            "only": list(self.only),
        }

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Rules:
        """What `to_dict` described."""
        return cls(
            pattern_from_dict(stored["default"]),
            tuple(
                (one, pattern and pattern_from_dict(pattern)) for one, pattern in stored["rules"]
            ),
            tuple(stored["ignore"]),
            tuple(stored["only"]),
        )

    @classmethod
    def of(cls, pattern: Pattern | Rules) -> Rules:
        """Rules as they are; a pattern for every layer."""
        return pattern if isinstance(pattern, Rules) else cls(pattern)

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> Rules:
        """The rules of a run, out of its record's settings."""
        if "rules" in settings:
            return cls.from_dict(settings["rules"])
        return cls(pattern_from_dict(settings["pattern"]))

    def _expressions(self) -> list[str]:
        return [*(one for one, _ in self.rules), *self.ignore, *self.only]


def matches(expression: str, layer: str) -> bool:
    """Whether a name with ``*``, or a regular expression after ``re:``, is a layer's whole name."""
    if expression.startswith(_REGEX):
        return re.fullmatch(expression.removeprefix(_REGEX), layer) is not None
    parts = (re.escape(part) for part in expression.split("*"))
    return re.fullmatch(".*".join(parts), layer) is not None


def parse_rule(text: str, scope: str = "row") -> tuple[str, Pattern | None]:
    """``NAME=PATTERN`` as a rule.

    Parameters
    ----------
    text
        The pattern is a sparsity (0.5), keep:group (2:4) or "dense".
    scope
        Of a sparsity: "row" or "layer".

    Raises
    ------
    InvalidInput
        If it is no such rule.
    """
    expression, equals, value = text.rpartition("=")
    if not equals or not expression.strip() or not value.strip():
        raise InvalidInput(f"Rule '{text}' is not of the form NAME=PATTERN, such as '*.mlp.*=0.5'.")
    return expression.strip(), parse_rule_pattern(value.strip(), scope)


def parse_rule_pattern(text: str, scope: str) -> Pattern | None:
    """A sparsity, keep:group or "dense"."""
    if text == DENSE:
        return None
    if ":" in text:
        return NM.parse(text)
    try:
        sparsity = float(text)
    except ValueError:
        raise InvalidInput(
            f"'{text}' is neither a sparsity (0.5), nor keep:group (2:4), nor {DENSE}."
        ) from None
    return PerRow(sparsity=sparsity) if scope == "row" else PerLayer(sparsity=sparsity)
