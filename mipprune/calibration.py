"""Text in, windows of tokens out: for calibration and for evaluation alike."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solvers import InvalidInput
from solvers.files import replaced_on_success

from .embedded import MODEL_NAME, Side, python_documentation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_COLUMN = "text"

_STREAM = "stream:"

_BUFFER = 1000
"""Documents of a stream among which the next one is drawn."""

_SPLIT_NAME = re.compile(r"(train|test|validation|valid|dev)([-_.].*)?", re.IGNORECASE)
"""Files so named make a folder a data set with splits."""


@dataclass(frozen=True)
class Windows:
    """Equally long token windows with a record of where they are from.

    Attributes
    ----------
    tokens
        int64 ``[windows, length]``.
    source
        The text's name.
    origin
        What else is known of it, for the record: hashes of text and tokenizer, seed.
    """

    tokens: Tensor
    source: str
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids (int64, little endian, row by row) and their shape."""
        header = f"{tuple(self.tokens.shape)}".encode()
        return sha256(header + self.tokens.numpy().astype("<i8").tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a token file: safetensors with ``tokens`` (int32) and the rest as metadata."""
        from safetensors.torch import save_file

        about = {"source": self.source, "sha256": self.digest, "origin": json.dumps(self.origin)}
        with replaced_on_success(path) as temporary:
            save_file(
                {"tokens": self.tokens.to(torch.int32)}, temporary, {_TOKEN_FILE: "1", **about}
            )

    @classmethod
    def load(cls, path: str | Path) -> Windows:
        """Read a token file.

        Raises
        ------
        InvalidInput
            If it is none, or its tokens are not those that its hash was taken of.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as stored:
                about = stored.metadata() or {}
                if _TOKEN_FILE not in about:
                    raise InvalidInput(f"{path} is no token file; write one with mipprune tokens.")
                tokens = stored.get_tensor("tokens").long()
            windows = cls(tokens, about["source"], json.loads(about["origin"]))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{path} cannot be read as a token file ({error}).") from error
        if windows.digest != about["sha256"]:
            raise InvalidInput(f"{path} is damaged: its tokens do not have the hash it states.")
        return windows


_TOKEN_FILE = "mipprune_tokens"


@dataclass(frozen=True)
class TextSource:
    """A text by its name, ``[stream:]NAME[:CONFIG][#SPLIT][@COLUMN]``.

    Attributes
    ----------
    text
        As given.
    name
        File, folder or ``datasets`` id; None for Python's own documentation.
    config, split
        Of a data set.
    column
        Where a row's text stands.
    stream
        Read only as far as needed.
    """

    text: str
    name: str | None
    config: str | None = None
    split: str | None = None
    column: str = _COLUMN
    stream: bool = False

    @classmethod
    def parse(cls, source: str | None) -> TextSource:
        """Take a name apart; a path that exists is never taken apart."""
        if source is None or source == MODEL_NAME:
            return cls("Python documentation", None)
        stream = source.startswith(_STREAM)
        rest = source.removeprefix(_STREAM)
        column = split = config = ""
        if not _path(rest).exists():
            rest, _, column = rest.partition("@")
        if not _path(rest).exists():
            rest, _, split = rest.partition("#")
        if not _path(rest).exists() and _path(rest).suffix.lower() not in _READERS:
            rest, _, config = rest.partition(":")
        return cls(source, rest, config or None, split or None, column or _COLUMN, stream)

    def documents(self, side: Side) -> Iterable[str]:
        """See `read_texts`."""
        if self.name is None:
            return python_documentation(side)
        files = self._files()
        if files is not None:
            documents = (text for file in files for text in self._read(file))
            return Streamed(documents) if self.stream else documents
        return self._rows(side)

    def digest(self, side: Side) -> str | None:
        """SHA-256 of the text as it is stored; None where that is not known (streams of a hub)."""
        files = self._files()
        if self.name is None:
            parts = [text.encode() for text in python_documentation(side)]
        elif files is not None:
            # The files' own names are left out: a text that was moved is still that text.
            parts = [file.suffix.encode() + file.read_bytes() for file in files]
        elif self.stream:
            return None
        else:
            parts = [str(self._load(side)._fingerprint).encode()]
        digest = sha256(self.column.encode())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _files(self) -> list[Path] | None:
        """Local text files, in the order of their names; None if this is a data set."""
        assert self.name is not None or not self.stream
        if self.name is None:
            return None
        path = _path(self.name)
        if path.is_dir() and self.split is None:
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in _READERS
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not files:
                raise InvalidInput(f"The folder {path} holds no .txt, .jsonl or .parquet file.")
            return None if any(_SPLIT_NAME.fullmatch(file.stem) for file in files) else files
        if path.is_dir():
            return None
        if path.suffix.lower() in _READERS:
            if not path.is_file():
                raise InvalidInput(f"There is no text file at {path}.")
            return [path]
        if path.is_file():
            raise InvalidInput(f"{path} is neither .txt, .jsonl nor .parquet.")
        return None

    def _read(self, file: Path) -> Iterator[str]:
        return _READERS[file.suffix.lower()](file, self.column)

    def _load(self, side: Side) -> Any:
        try:
            import datasets
        except ImportError:
            raise InvalidInput(
                f"Reading the data set '{self.text}' needs datasets: pip install datasets."
            ) from None
        split = self.split or ("train" if side == "calibration" else "test")
        try:
            return datasets.load_dataset(self.name, self.config, split=split, streaming=self.stream)
        except Exception as error:  # datasets raises many kinds; all mean that it cannot be had
            raise InvalidInput(
                f"'{self.text}' is neither a text file nor a data set that can be had here "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})."
            ) from error

    def _rows(self, side: Side) -> Iterable[str]:
        rows = self._load(side)
        texts = (_text_of(row, self.column, f"Data set '{self.text}'") for row in rows)
        return Streamed(texts) if self.stream else texts


@dataclass(frozen=True)
class Streamed:
    """Documents that are only read as far as they are needed."""

    documents: Iterable[str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)

    def shuffled(self, chance: random.Random) -> Iterator[str]:
        """Each drawn from a buffer of the next `_BUFFER` ones."""
        buffer: list[str] = []
        for text in self.documents:
            if len(buffer) < _BUFFER:
                buffer.append(text)
                continue
            at = chance.randrange(_BUFFER)
            yield buffer[at]
            buffer[at] = text
        chance.shuffle(buffer)
        yield from buffer


def read_texts(source: str | None, side: Side) -> tuple[str, Iterable[str]]:
    """Documents of a text source, with its name.

    Parameters
    ----------
    source
        ``[stream:]NAME[:CONFIG][#SPLIT][@COLUMN]``. A name is a ``.txt`` file (one document), a
        ``.jsonl``/``.json`` or ``.parquet`` file (one document per row), a folder of such files,
        read in the order of their names, or a ``datasets`` id (as is a folder whose files are
        named after splits). The column is "text" unless one is named. A stream is read only as
        far as needed. None or "embedded" is Python's own documentation.
    side
        Which half of Python's documentation, and which split of a data set ("train" to calibrate,
        "test" to evaluate) unless one is named.

    Raises
    ------
    InvalidInput
        If the source is missing, empty, or has no such column.
    """
    chosen = TextSource.parse(source)
    if chosen.name is None:
        return f"{chosen.text} ({side})", chosen.documents(side)
    name = _path(chosen.name)
    return (name.name if name.is_file() else chosen.text), chosen.documents(side)


def read_windows(
    source: str | None,
    side: Side,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
    *,
    cache: str | Path | None = None,
    in_order: bool = False,
) -> Windows:
    """Windows of a text, or of a token file (``.safetensors``, see `Windows.save`).

    Parameters
    ----------
    source, side
        See `read_texts`.
    tokenizer, length, count, seed, in_order
        See `cut_windows`.
    cache
        Folder of token files. One that was cut from the same text (by its hash) with the same
        tokenizer and settings is read instead of cutting; otherwise it is written.

    Raises
    ------
    InvalidInput
        As these do; and if a token file was made with another tokenizer, or for windows of
        another length.
    """
    if source is not None and source.endswith(".safetensors"):
        return _from_token_file(Path(source).expanduser(), tokenizer, length, count)
    origin = {"tokenizer_sha256": tokenizer_digest(tokenizer), "seed": seed}
    file = None
    if cache is not None:
        origin["text_sha256"] = TextSource.parse(source).digest(side)
        if origin["text_sha256"] is not None:
            settings = json.dumps([1, origin, length, count, in_order], sort_keys=True)
            file = Path(cache).expanduser() / f"{sha256(settings.encode()).hexdigest()}.safetensors"
            if file.is_file():
                return Windows.load(file)
    name, texts = read_texts(source, side)
    cut = cut_windows(texts, name, tokenizer, length, count, seed, in_order=in_order)
    windows = Windows(cut.tokens, cut.source, origin)
    if file is not None:
        windows.save(file)
    return windows


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does with plain text, however it is stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = backend.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return sha256(f"{tokenizer.eos_token_id} {rules}".encode()).hexdigest()


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    samples: int,
    seqlen: int,
    seed: int,
    token_cache: str | Path | None = None,
) -> Windows:
    """Windows to calibrate on, no longer than the model's positions."""
    windows = calibration
    if not isinstance(windows, Windows):
        length = window_length(model.config, seqlen)
        windows = read_windows(
            windows, "calibration", tokenizer, length, samples, seed, cache=token_cache
        )
    check_tokens(model, windows)
    return windows


def check_tokens(model: PreTrainedModel, windows: Windows) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises
    ------
    InvalidInput
        If there is one: the tokenizer is another model's.
    """
    embeddings: Any = model.get_input_embeddings()
    highest, known = int(windows.tokens.max()), embeddings.weight.shape[0]
    if highest >= known:
        raise InvalidInput(
            f"The tokenizer gives token {highest}, but the model embeds only {known} tokens; "
            "use the model's own tokenizer."
        )


def cut_windows(
    texts: Iterable[str],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
    *,
    in_order: bool = False,
) -> Windows:
    """Draw ``count`` windows that do not overlap; all there are, if there are fewer.

    Documents are tokenised, joined by the end-of-text token and cut. With a ``count``, they are
    shuffled before, taken until there are enough tokens, and the windows are a random choice in
    random order; without, or ``in_order``, windows come in the text's order.

    Raises
    ------
    InvalidInput
        If the text is empty or shorter than one window, or a stream is to be read whole.
    """
    if length < 2 or (count is not None and count < 1):
        raise InvalidInput(
            f"{count} windows of {length} tokens hold nothing to predict; "
            "give at least 1 window of 2."
        )
    if count is None and isinstance(texts, Streamed):
        raise InvalidInput(f"The stream {source} may have no end; give a number of samples.")
    chance = random.Random(seed)
    tokens: list[int] = []
    used = 0
    for text in _ordered(texts, None if count is None or in_order else chance):
        used += 1
        tokens.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if count is not None and len(tokens) >= length * count:
            break
    if used == 0:
        raise InvalidInput(f"The text {source} is empty.")
    available = len(tokens) // length
    if available == 0:
        raise InvalidInput(
            f"The text {source} has {len(tokens)} tokens, less than one window of {length}; "
            "give more text or a shorter window."
        )
    windows = torch.tensor(tokens[: available * length]).view(available, length)
    if in_order:
        windows = windows[:count]
    elif count is not None:
        windows = windows[chance.sample(range(available), min(count, available))]
    return Windows(windows, source)


def _ordered(texts: Iterable[str], chance: random.Random | None) -> Iterator[str]:
    """Documents that are not blank, shuffled if there is something to shuffle with."""
    if chance is not None and isinstance(texts, Streamed):
        texts = texts.shuffled(chance)
    elif chance is not None:
        texts = [text for text in texts if text.strip()]
        chance.shuffle(texts)
    return (text for text in texts if text.strip())


def _from_token_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None
) -> Windows:
    if not path.is_file():
        raise InvalidInput(f"There is no token file at {path}.")
    windows = Windows.load(path)
    made_with = windows.origin.get("tokenizer_sha256")
    if made_with != tokenizer_digest(tokenizer):
        raise InvalidInput(f"{path} was made with another tokenizer than the model's.")
    if windows.tokens.shape[1] != length:
        raise InvalidInput(
            f"{path} holds windows of {windows.tokens.shape[1]} tokens, not {length}; "
            "give that sequence length."
        )
    return Windows(windows.tokens[:count], windows.source, windows.origin)


def window_length(config: PretrainedConfig, wanted: int) -> int:
    """``wanted`` tokens, or as many as the model's positions allow."""
    limit = getattr(config, "max_position_embeddings", None)
    return min(wanted, limit) if isinstance(limit, int) and limit > 0 else wanted


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _from_text(path: Path, _: str) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text.") from None


def _from_json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # no UTF-8 either
                raise InvalidInput(f"{path}, line {number}, is not JSON.") from None
            yield _text_of(row, column, f"{path}, line {number},")


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise InvalidInput(f"{path} has no column '{column}'.")
        for batch in file.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                yield _text_of(row, column, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{path} is not a parquet file ({error}).") from error


def _text_of(row: Any, column: str, where: str) -> str:
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InvalidInput(f"{where} has no text under '{column}'.")
    return text


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".json": _from_json_lines,
    ".parquet": _from_parquet,
}
