"""Text in, windows of tokens out: for calibration and for evaluation alike."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solvers import InvalidInput

from .embedded import MODEL_NAME, Side, python_documentation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_COLUMN = "text"


@dataclass(frozen=True)
class Windows:
    """Equally long token windows with a record of where they are from.

    Attributes
    ----------
    tokens
        int64 ``[windows, length]``.
    source
        The text's name.
    """

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids (int64, little endian, row by row) and their shape."""
        header = f"{tuple(self.tokens.shape)}".encode()
        return sha256(header + self.tokens.numpy().astype("<i8").tobytes()).hexdigest()


def read_texts(source: str | None, side: Side) -> tuple[str, Iterable[str]]:
    """Documents of a text source, with its name.

    Parameters
    ----------
    source
        A ``.txt`` file (one document), a ``.jsonl``/``.json`` or ``.parquet`` file (one document
        per row of the column "text"), or a ``datasets`` id, written ``id``, ``id:config`` or
        ``id:config#split``. None or "embedded" is Python's own documentation.
    side
        Which half of Python's documentation, and which split of a data set ("train" to calibrate,
        "test" to evaluate) unless one is named.

    Raises
    ------
    InvalidInput
        If the source is missing, empty, or has no column "text".
    """
    if source is None or source == MODEL_NAME:
        return f"Python documentation ({side})", python_documentation(side)
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.is_file():
        raise InvalidInput(f"{path} is neither .txt, .jsonl nor .parquet.")
    if reader is None:
        return source, _from_datasets(source, "train" if side == "calibration" else "test")
    if not path.is_file():
        raise InvalidInput(f"There is no text file at {path}.")
    return path.name, reader(path)


def cut_windows(
    texts: Iterable[str],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
) -> Windows:
    """Draw ``count`` windows that do not overlap; all there are, if there are fewer.

    Documents are tokenised, joined by the end-of-text token and cut. With a ``count``, they are
    shuffled before, taken until there are enough tokens, and the windows are a random choice in
    random order; without, all windows come in the text's order.

    Raises
    ------
    InvalidInput
        If the text is empty or shorter than one window.
    """
    if length < 2 or (count is not None and count < 1):
        raise InvalidInput(
            f"{count} windows of {length} tokens hold nothing to predict; "
            "give at least 1 window of 2."
        )
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise InvalidInput(f"The text {source} is empty.")
    chance = random.Random(seed)
    if count is not None:
        chance.shuffle(documents)
    tokens: list[int] = []
    for text in documents:
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if count is not None and len(documents) > 1 and len(tokens) >= length * count:
            break
    available = len(tokens) // length
    if available == 0:
        raise InvalidInput(
            f"The text {source} has {len(tokens)} tokens, less than one window of {length}; "
            "give more text or a shorter window."
        )
    windows = torch.tensor(tokens[: available * length]).view(available, length)
    if count is not None:
        windows = windows[chance.sample(range(available), min(count, available))]
    return Windows(windows, source)


def window_length(config: PretrainedConfig, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model's positions allow."""
    limit = getattr(config, "max_position_embeddings", None)
    return min(wanted, limit) if isinstance(limit, int) and limit > 0 else wanted


def _from_text(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text.") from None


def _from_json_lines(path: Path) -> Iterator[str]:
    import json

    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise InvalidInput(f"{path}, line {number}, is not JSON.") from None
            yield _text_of(row, f"{path}, line {number},")


def _from_parquet(path: Path) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InvalidInput(f"{path} is not a parquet file ({error}).") from error
    if _COLUMN not in file.schema_arrow.names:
        raise InvalidInput(f"{path} has no column '{_COLUMN}'.")
    texts: list[str] = file.read(columns=[_COLUMN])[_COLUMN].to_pylist()
    return texts


def _from_datasets(source: str, default_split: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise InvalidInput(
            f"Reading the data set '{source}' needs datasets: pip install datasets."
        ) from None
    name, _, split = source.partition("#")
    name, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or default_split)
    except Exception as error:  # datasets raises many kinds; all mean that it cannot be had
        raise InvalidInput(
            f"'{source}' is neither a text file nor a data set that can be had here "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
        ) from error
    for row in rows:
        yield _text_of(row, f"Data set '{source}'")


def _text_of(row: Any, where: str) -> str:
    text = row.get(_COLUMN) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InvalidInput(f"{where} has no text under '{_COLUMN}'.")
    return text


_READERS = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".json": _from_json_lines,
    ".parquet": _from_parquet,
}
