import copy
import functools
import json

import pytest
import torch
from models import tiny_model

from mipprune.calibration import (
    Streamed,
    TextSource,
    Windows,
    check_tokens,
    cut_windows,
    read_texts,
    read_windows,
    window_length,
)
from mipprune.embedded import python_documentation, word_runs
from solvers import InvalidInput

DOCUMENTS = [
    f"Document {i}. " + "The quick brown fox jumps over the lazy dog. " * 20 for i in range(6)
]


@pytest.fixture
def tokenizer(embedded):
    return embedded.tokenizer


def write(path, documents=DOCUMENTS):
    if path.suffix == ".txt":
        path.write_text("\n".join(documents))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text, "id": 0}) for text in documents))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": documents, "id": range(len(documents))}), path)
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_local_files(tmp_path, tokenizer, suffix):
    source, texts = read_texts(write(tmp_path / f"text.{suffix}"), "calibration")
    windows = cut_windows(texts, source, tokenizer, length=32, count=8, seed=0)
    assert windows.source == f"text.{suffix}"
    assert windows.tokens.shape == (8, 32)
    assert "fox jumps" in tokenizer.decode(windows.tokens[0])


def test_a_datasets_folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.parquet")
    write(folder / "test.parquet", ["Only this one."])
    source, texts = read_texts(str(folder), "calibration")
    assert list(texts) == DOCUMENTS
    assert list(read_texts(f"{folder}#test", "calibration")[1]) == ["Only this one."]
    assert list(read_texts(str(folder), "evaluation")[1]) == ["Only this one."]
    assert source == str(folder)


def test_windows_do_not_overlap_and_depend_on_the_seed(tokenizer):
    texts = python_documentation("calibration")
    one = cut_windows(texts, "x", tokenizer, 64, 30, seed=1)
    same = cut_windows(texts, "x", tokenizer, 64, 30, seed=1)
    other = cut_windows(texts, "x", tokenizer, 64, 30, seed=2)
    assert one.digest == same.digest != other.digest
    assert len({tuple(window) for window in one.tokens.tolist()}) == 30
    everything = cut_windows(DOCUMENTS, "x", tokenizer, 64)
    ids = [
        token
        for text in DOCUMENTS
        for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    assert everything.tokens.flatten().tolist() == ids[: len(ids) // 64 * 64]


def test_the_digest_covers_values_and_shape():
    tokens = torch.arange(12)
    one, other = Windows(tokens.view(3, 4), "x"), Windows(tokens.view(4, 3), "x")
    assert one.digest != other.digest
    changed = tokens.clone()
    changed[5] = 0
    assert Windows(changed.view(3, 4), "x").digest != one.digest


def test_too_little_text_gives_fewer_windows(tokenizer):
    windows = cut_windows(DOCUMENTS[:1], "x", tokenizer, 64, 1000)
    assert 1 <= len(windows.tokens) < 1000


def test_the_embedded_sides_never_overlap():
    calibration, evaluation = (python_documentation(side) for side in ("calibration", "evaluation"))
    runs = {run for text in calibration for run in word_runs(text)}
    paragraphs = [p for text in evaluation for p in text.split("\n\n")]
    assert sum(map(len, calibration)) > 300_000
    assert sum(map(len, evaluation)) > 200_000
    assert all(runs.isdisjoint(word_runs(paragraph)) for paragraph in paragraphs)


def test_texts_that_cannot_be_had_are_refused(tmp_path, tokenizer):
    def cut(source, length=8):
        name, texts = read_texts(source, "calibration")
        return cut_windows(texts, name, tokenizer, length, 4)

    with pytest.raises(InvalidInput, match="no text file at"):
        cut(str(tmp_path / "missing.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InvalidInput, match=r"empty\.txt is empty"):
        cut(str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(InvalidInput, match="less than one window of 512"):
        cut(str(tmp_path / "short.txt"), length=512)
    with pytest.raises(InvalidInput, match="nothing to predict"):
        cut(str(tmp_path / "short.txt"), length=1)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        cut(str(tmp_path / "latin.txt"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{broken')
    with pytest.raises(InvalidInput, match="line 2, is not JSON"):
        cut(str(tmp_path / "bad.jsonl"))
    (tmp_path / "column.jsonl").write_text('{"words": "fine"}')
    with pytest.raises(InvalidInput, match="no text under 'text'"):
        cut(str(tmp_path / "column.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\x00")
    with pytest.raises(InvalidInput, match="line 1, is not JSON"):
        cut(str(tmp_path / "binary.jsonl"))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(InvalidInput, match="not a parquet file"):
        cut(str(tmp_path / "bad.parquet"))
    (tmp_path / "text.doc").write_text("?")
    with pytest.raises(InvalidInput, match=r"neither \.txt, \.jsonl nor \.parquet"):
        cut(str(tmp_path / "text.doc"))
    with pytest.raises(InvalidInput, match="neither a text file nor a data set"):
        cut("nobody/nothing")


def test_window_length_is_limited_by_the_positions(embedded):
    assert window_length(embedded.model.config, 2048) == 256
    assert window_length(embedded.model.config, 100) == 100


def texts_of(source, side="calibration"):
    return list(read_texts(str(source), side)[1])


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "b.jsonl", ["second", "third"])
    write(tmp_path / "a.txt", ["first"])
    write(tmp_path / "deep" / "c.parquet", ["fourth"])
    write(tmp_path / ".hidden" / "d.txt", ["never"])
    (tmp_path / "notes.md").write_text("never")
    assert texts_of(tmp_path) == ["first", "second", "third", "fourth"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"holds no \.txt, \.jsonl or \.parquet"):
        texts_of(tmp_path / "empty")


def test_a_column_may_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "one", "text": "no"}\n{"body": "two", "text": "no"}\n')
    assert texts_of(f"{rows}@body") == ["one", "two"]
    with pytest.raises(InvalidInput, match="line 1, has no text under 'title'"):
        texts_of(f"{rows}@title")
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(rows.read_text())
    assert texts_of(f"{data}#train@body") == ["one", "two"]
    assert texts_of(f"stream:{data}#train@body") == ["one", "two"]
    odd = tmp_path / "a@b#c:d.txt"
    odd.write_text("a path that exists is never taken apart")
    assert texts_of(odd) == [odd.read_text()]


def test_names_are_taken_apart():
    got = TextSource.parse("stream:allenai/c4:en#validation@body")
    assert (got.name, got.config, got.split, got.column, got.stream) == (
        "allenai/c4", "en", "validation", "body", True,
    )  # fmt: skip
    got = TextSource.parse("wikitext:wikitext-2-raw-v1")
    assert (got.name, got.config, got.split, got.column) == (
        "wikitext", "wikitext-2-raw-v1", None, "text",
    )  # fmt: skip


def test_a_stream_is_read_only_as_far_as_needed(tmp_path, tokenizer):
    read = []

    def endless():
        while True:
            read.append(None)
            yield f"Document {len(read)} says hello to the world. " * 10

    windows = cut_windows(Streamed(endless()), "x", tokenizer, 32, 50, seed=1)
    assert windows.tokens.shape == (50, 32)
    assert len(read) < 1100
    again = cut_windows(Streamed(f"Document {i} says hello to the world. " * 10 for i in
        range(1, 2000)), "x", tokenizer, 32, 50, seed=1)  # fmt: skip
    assert torch.equal(again.tokens, windows.tokens)
    with pytest.raises(InvalidInput, match="may have no end"):
        cut_windows(Streamed(endless()), "x", tokenizer, 32)
    source = write(tmp_path / "t.jsonl")
    assert sorted(texts_of(f"stream:{source}")) == sorted(DOCUMENTS)


def test_a_token_cache_saves_the_cutting(tmp_path, tokenizer, monkeypatch):
    source, cache = write(tmp_path / "text.jsonl"), tmp_path / "cache"
    read = functools.partial(read_windows, source, "calibration", tokenizer, 32, cache=cache)
    one = read(8, seed=3)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr("mipprune.calibration.cut_windows", None)
        same = read(8, seed=3)
    assert same.digest == one.digest
    assert (same.source, same.origin) == (one.source, one.origin)
    assert one.origin.keys() == {"tokenizer_sha256", "seed", "text_sha256"}
    read(8, seed=4)
    read(9, seed=3)
    assert len(list(cache.iterdir())) == 3
    write(tmp_path / "text.jsonl", [*DOCUMENTS, "One more. " * 30])
    assert read(8, seed=3).origin["text_sha256"] != one.origin["text_sha256"]
    assert len(list(cache.iterdir())) == 4
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["jumps over"])
    read_windows(source, "calibration", other, 32, 8, 3, cache=cache)
    assert len(list(cache.iterdir())) == 5
    plain = read_windows(source, "calibration", tokenizer, 32, 8, 3)
    assert plain.tokens.shape == one.tokens.shape


def test_a_token_file_is_a_source(tmp_path, tokenizer):
    file = tmp_path / "tokens.safetensors"
    made = read_windows(write(tmp_path / "t.txt"), "calibration", tokenizer, 32, 8, 3)
    made.save(file)
    read = functools.partial(read_windows, str(file), "calibration", tokenizer)
    assert read(32).digest == made.digest
    assert torch.equal(read(32, 5).tokens, made.tokens[:5])
    with pytest.raises(InvalidInput, match="windows of 32 tokens, not 16"):
        read(16)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["jumps over"])
    with pytest.raises(InvalidInput, match="another tokenizer"):
        read_windows(str(file), "calibration", other, 32)
    with pytest.raises(InvalidInput, match="no token file at"):
        read_windows(str(tmp_path / "no.safetensors"), "calibration", tokenizer, 32)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match="damaged"):
        read(32)
    file.write_bytes(content[:50])
    with pytest.raises(InvalidInput, match="cannot be read as a token file"):
        read(32)
    from safetensors.torch import save_file

    save_file({"tokens": torch.zeros(2, 2)}, file)
    with pytest.raises(InvalidInput, match="is no token file"):
        read(32)


def test_tokens_that_the_model_does_not_embed_are_refused():
    model = tiny_model("llama")
    check_tokens(model, Windows(torch.tensor([[95, 3]]), "x"))
    with pytest.raises(InvalidInput, match="gives token 96, but the model embeds only 96"):
        check_tokens(model, Windows(torch.tensor([[3, 96]]), "x"))
