"""A run's options as one YAML file, equal to the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from solvers import InvalidInput

PAIRS = ("option", "rule")
"""Options of the form name=value that a recipe may also write as a mapping."""

_ABSENT = ("", "~", "null")


def read_recipe(
    path: str | Path, known: Collection[str], repeated: Collection[str]
) -> dict[str, str | list[str]]:
    """Options out of a YAML file, each as the text or the texts that the command line would have.

    Every value is taken as text, so that ``2:4`` stays what it is (YAML 1.1 reads it as 124).
    A key is an option's name; ``-`` and ``_`` are the same. An option that may be repeated has a
    list; those of the form name=value (`PAIRS`) may have a mapping. "null" is as if left out.

    Parameters
    ----------
    path
        The file.
    known
        Names of the options, with ``_``.
    repeated
        Those that may have a list.

    Raises
    ------
    InvalidInput
        If the file cannot be read, is no mapping, or has a key twice or one that is no option.
    """
    values: dict[str, str | list[str]] = {}
    for written, value in _load(Path(path).expanduser()).items():
        key = written.replace("-", "_")
        if key not in known:
            names = ", ".join(sorted(name.replace("_", "-") for name in known))
            raise InvalidInput(f"{path}: there is no option '{written}'; the options are {names}.")
        if key in values:
            raise InvalidInput(f"{path}: the option '{written}' is given twice.")
        pairs = isinstance(value, dict) and key in PAIRS
        texts = list(value.values()) if pairs else value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise InvalidInput(f"{path}: the value of '{written}' holds more than plain text.")
        if isinstance(value, list) and key not in repeated:
            raise InvalidInput(f"{path}: the option '{written}' has one value, not a list.")
        if pairs:
            value = [f"{name}={text}" for name, text in value.items()]
        if value not in _ABSENT:
            values[key] = value
    return values


def recipe_text(values: Mapping[str, Any]) -> str:
    """YAML that `read_recipe` reads; options that are None, empty or off are left out."""
    import yaml

    given = {
        name.replace("_", "-"): list(value) if isinstance(value, (list, tuple)) else _plain(value)
        for name, value in values.items()
        if value is not None and value is not False and value != [] and value != ()
    }
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)
    return text


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float)) else str(value)


def _load(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]
        """All scalars are texts, and no key stands twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
            pairs = [(self.construct_object(key, deep=True), value) for key, value in node.value]
            keys = [key for key, _ in pairs]
            for key in keys:
                if not isinstance(key, str):
                    raise InvalidInput(f"{path}: {key} is no name of an option.")
                if keys.count(key) > 1:
                    raise InvalidInput(f"{path}: '{key}' stands there twice.")
            return {key: self.construct_object(value, deep=True) for key, value in pairs}

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The recipe {path} cannot be read ({error}).") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidInput(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} holds no options; write one 'name: value' a line.")
    return content
