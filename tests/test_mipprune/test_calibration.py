import json

import pytest
import torch

from mipprune.calibration import Windows, cut_windows, read_texts, window_length
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
