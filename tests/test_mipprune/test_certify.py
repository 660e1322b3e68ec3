import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, tiny_tokens
from safetensors.numpy import load_file, save_file

import mipprune
from mipprune.calibration import Windows
from mipprune.certify import _sample, certify, check_folder
from mipprune.models import LoadedModel
from mipprune.rules import Rules
from solvers import NM, InvalidInput, PerLayer, PerRow, checker_folder
from solvers.certificate import load_certificates, save_certificates

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")


def dense():
    return LoadedModel(tiny_model("llama"), None, torch.float32)


def pruned(folder, embedded, pattern=None, **options):
    model = tiny_model("llama")
    pattern = pattern or PerRow(sparsity=0.5)
    report = mipprune.prune(model, None, WINDOWS, pattern, samples=8, **options)
    mipprune.save(folder, model, embedded.tokenizer, report)
    return folder


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    embedded = mipprune.load_model("embedded", torch.device("cpu"))
    folder = pruned(tmp_path_factory.mktemp("certified") / "model", embedded)
    results = certify(folder, rows=3, row_seconds=2.0, model=dense(), calibration=WINDOWS)
    return folder, results


def test_every_layer_gets_a_valid_gap(certified):
    folder, results = certified
    assert len(results) == 21
    for result in results:
        assert len(result.rows) == len(set(result.rows)) == 3
        assert 0 <= result.gap < 1
        assert result.bound <= result.loss
        assert result.margin > 0
    record = json.loads((folder / "mipprune.json").read_text())
    written = [layer["certificate"]["gap"] for layer in record["layers"]]
    assert written == [result.gap for result in results]


def test_the_folder_checks_itself(certified):
    folder, results = certified
    verified = check_folder(folder)
    assert {name: count for name, (count, _) in verified.items()} == {
        result.name: 3 for result in results
    }
    for result in results:
        assert verified[result.name][1] == pytest.approx(result.gap, abs=1e-9)


def test_a_run_with_a_recipe_is_repeated(tmp_path, embedded):
    layer_step = mipprune.LayerStep(mipprune.Surrogate(shrink=0.5), "least_squares")
    folder = pruned(tmp_path / "model", embedded, layer_step=layer_step)
    model = dense()
    results = certify(folder, rows=1, row_seconds=0.2, model=model, calibration=WINDOWS)
    assert len(check_folder(folder)) == len(results) == 21
    saved = mipprune.load_model(str(folder), torch.device("cpu")).model.state_dict()
    again = model.model.state_dict()
    assert all(torch.allclose(saved[name], again[name], atol=1e-6) for name in saved)


def copied(certified, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(certified[0], folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers, certified; small enough to be copied for every forgery."""
    embedded = mipprune.load_model("embedded", torch.device("cpu"))
    rules = Rules(PerRow(sparsity=0.5), only=(Q, DOWN))
    folder = pruned(tmp_path_factory.mktemp("small") / "model", embedded, rules)
    certify(folder, rows=3, row_seconds=1.0, model=dense(), calibration=WINDOWS)
    for other in folder.iterdir():
        if other.name not in FORGED and other.name != "certificates":
            other.unlink()
    return folder


FORGED = ("mipprune.json", "masks.safetensors", "model.safetensors")
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


class Forgery:
    """A copy of a certified folder, and ways to change it."""

    def __init__(self, folder, name=Q):
        self.folder, self.name = folder, name
        self.certificates = folder / "certificates" / f"{name}.safetensors"
        self.problem = folder / "certificates" / f"{name}.problem.safetensors"
        self.record = json.loads((folder / "mipprune.json").read_text())
        self.layer = next(one for one in self.record["layers"] if one["name"] == name)

    def write(self):
        (self.folder / "mipprune.json").write_text(json.dumps(self.record))

    def claims(self, change):
        save_certificates(self.certificates, change(load_certificates(self.certificates)))

    def each(self, **changes):
        self.claims(
            lambda found: [
                dataclasses.replace(c, **{key: change(c) for key, change in changes.items()})
                for c in found
            ]
        )

    def tensors(self, file, change):
        tensors = load_file(self.folder / file)
        metadata = checker_folder.read_tensors(self.folder / file)[1]
        save_file({**tensors, **change(tensors)}, self.folder / file, metadata=metadata)


def overflow(f):
    f.each(offset=lambda c: 1e200, bound=lambda c: 0.9999e-3)
    f.layer["certificate"].update(bound=f.layer["certificate"]["loss"] * 0.9999, gap=1e-4)


def zero_gram(f):
    f.tensors(f.problem, lambda t: {"gram": 0 * t["gram"]})
    f.each(bound=lambda c: -1e-9, offset=lambda c: 0.0, diagonal=lambda c: 0 * c.diagonal)
    f.each(
        family=lambda c: c.family[:0],
        index=lambda c: c.index[:0],
        multiplier=lambda c: c.multiplier[:0],
    )
    f.layer["certificate"].update(bound=0.0, loss=0.0, gap=0.0)


def other_gram(f):
    claims = load_certificates(f.certificates)
    weight = np.stack([np.where(c.mask, 10.0, 1.0) for c in claims]).astype(np.float32)
    gram = np.eye(weight.shape[1])
    f.tensors(f.problem, lambda t: {"weight": weight, "gram": gram})
    removed = int((~claims[0].mask).sum())
    f.each(
        bound=lambda c: removed - 1e-3,
        offset=lambda c: float(removed),
        diagonal=lambda c: np.ones(len(c.mask)),
        family=lambda c: c.family[:0],
        index=lambda c: c.index[:0],
        multiplier=lambda c: c.multiplier[:0],
        shift=lambda c: 1e-9,
    )
    total = float(len(claims) * removed)
    f.layer["certificate"].update(bound=total - 0.01, loss=total, gap=0.0)


def flattering(f):
    f.claims(lambda found: [dataclasses.replace(found[1], row=0)])
    f.tensors(f.problem, lambda t: {"weight": t["weight"][1:2]})
    f.layer["certificate"]["rows"] = f.layer["certificate"]["rows"][1:2]


def repeated(f):
    f.claims(lambda found: [found[0]] * 50)
    f.layer["certificate"]["rows"] = f.layer["certificate"]["rows"][:1] * 50


def other_layer(f):
    other = Forgery(f.folder, DOWN)
    shutil.copy(other.certificates, f.certificates)
    shutil.copy(other.problem, f.problem)


def linked(f):
    f.problem.rename(f.folder.parent / "outside")
    f.problem.symlink_to(f.folder.parent / "outside")


def linked_folder(f):
    f.problem.parent.rename(f.folder.parent / "outside")
    f.problem.parent.symlink_to(f.folder.parent / "outside")


def repainted(f):
    random = np.random.default_rng(0)

    def change(t):
        own = t[f"{Q}.weight"]
        return {f"{Q}.weight": random.normal(size=own.shape).astype(own.dtype)}

    f.tensors("model.safetensors", change)


def other_kept_weight(f):
    f.tensors("model.safetensors", lambda t: {f"{Q}.weight": 2 * t[f"{Q}.weight"]})


def other_mask(f):
    packed = load_file(f.folder / "masks.safetensors")[Q]
    f.tensors("masks.safetensors", lambda t: {Q: packed[::-1].copy()})


def certificate(key, change):
    def forge(f):
        f.layer["certificate"][key] = change(f.layer["certificate"][key])

    return forge


ATTACKS = {
    "witness that overflows": (overflow, "semi-definite"),
    "gap of the record": (certificate("gap", lambda _: 0.0), "claims the gap"),
    "margin of the record": (certificate("margin", lambda _: 0.0), "claims the margin"),
    "loss of the record": (certificate("loss", lambda v: v / 2), "claims the loss"),
    "bound of the record": (certificate("bound", lambda v: 1.01 * v), "claims the bound"),
    "bound that is none": (certificate("bound", lambda _: float("nan")), "NaN"),
    "zero Gram matrix": (zero_gram, "digests"),
    "another Gram matrix": (other_gram, "digests"),
    "flattering row": (flattering, "seed draws"),
    "one row fifty times": (repeated, "seed draws"),
    "negative rows": (certificate("rows", lambda v: [r - 32 for r in v]), "seed draws"),
    "masks exchanged": (
        lambda f: f.claims(
            lambda c: [dataclasses.replace(c[0], mask=c[1].mask), *c[1:]],
        ),
        "not the model's",
    ),
    "certificates reversed": (lambda f: f.claims(lambda c: c[::-1]), "other rows"),
    "another layer's files": (other_layer, "digests"),
    "pattern removed": (lambda f: f.record["settings"].update(pattern=None), "pattern"),
    "multiplier below zero": (
        lambda f: f.each(
            family=lambda c: np.append(c.family, 0),
            index=lambda c: np.vstack([c.index, [[0, 1, 1]]]),
            multiplier=lambda c: np.append(c.multiplier, -1e-18),
        ),
        "negative",
    ),
    "bound raised": (lambda f: f.each(bound=lambda c: c.bound * 1.001), "claims the bound"),
    "negative input": (
        lambda f: f.each(
            family=lambda c: np.append(c.family, 0),
            index=lambda c: np.vstack([c.index, [[-1, 1, 1]]]),
            multiplier=lambda c: np.append(c.multiplier, 0.0),
        ),
        "no family or inputs",
    ),
    "family of floats": (lambda f: f.each(family=lambda c: c.family + 0.5), "integers"),
    "weights scaled": (
        lambda f: f.tensors(f.problem, lambda t: {"weight": t["weight"] * np.float32(1e-3)}),
        "digests",
    ),
    "link": (linked, "is a link.*cp -rL"),
    "folder that is a link": (linked_folder, "cp -rL"),
    "dense weights": (repainted, "not zero"),
    "other kept weights": (other_kept_weight, "kept weights"),
    "another mask": (other_mask, "hash of the masks"),
    "name out of the folder": (lambda f: f.layer.update(name="../model"), "no name of a layer"),
    "layer named twice": (lambda f: f.record["layers"].append(f.layer), "twice"),
    "less loss in all": (lambda f: f.layer.update(loss=1e-9, surrogate_loss=1e-9), "more than"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_forgeries_are_refused(small, tmp_path, name):
    shutil.copytree(small, tmp_path / "copy")
    forge, said = ATTACKS[name]
    forgery = Forgery(tmp_path / "copy")
    forge(forgery)
    forgery.write()
    with pytest.raises(InvalidInput, match=said):
        check_folder(tmp_path / "copy")


def test_layers_without_certificate_are_counted(small, tmp_path):
    shutil.copytree(small, tmp_path / "copy")
    forgery = Forgery(tmp_path / "copy")
    forgery.write()
    assert check_folder(tmp_path / "copy") == check_folder(small)
    del forgery.layer["certificate"]
    forgery.write()
    checked = check_folder(tmp_path / "copy")
    assert checked.missing == [Q]
    assert str(checked).startswith("1 of 2 layers, 3 of 64 rows verified")


def test_check_says_in_one_sentence_what_is_missing(run, small, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    code, printed, errors = run("check", folder)
    assert (code, errors) == (0, "")
    assert "2 of 2 layers, 6 of 64 rows verified; layer gaps " in printed
    assert checker_folder.NOT_PROVEN in printed
    forgery = Forgery(folder)
    del forgery.layer["certificate"]
    forgery.write()
    code, printed, errors = run("check", folder)
    assert (code, errors) == (0, "")
    assert f"Without certificate: {Q}\n" in printed
    monkeypatch.setitem(sys.modules, "flint", None)
    monkeypatch.delitem(sys.modules, "solvers.checker_exact", raising=False)
    exact = run("check", folder, "--exact")
    (folder / "certificates" / f"{DOWN}.problem.safetensors").unlink()
    without_file = run("check", folder)
    for layer in forgery.record["layers"]:
        layer.pop("certificate", None)
    forgery.write()
    for (code, printed, errors), said in (
        (exact, "pip install 'mipprune[exact]'"),
        (without_file, f"Layer {DOWN}: There is no file"),
        (run("check", folder), "has no certificates; make them with mipprune certify."),
    ):
        assert (code, printed) == (2, "")
        assert said in errors
        assert errors.startswith("Error: ")
        assert errors.count("\n") == 1


def test_the_record_says_what_its_bounds_rest_on(certified):
    record = json.loads((certified[0] / "mipprune.json").read_text())
    found = {layer["certificate"]["evidence"] for layer in record["layers"]}
    assert found == {"certified"}


def test_a_folder_is_checked_exactly_too(small):
    rough, exact = check_folder(small), check_folder(small, exact=True)
    assert rough.keys() == exact.keys()
    for name, (rows, gap) in rough.items():
        assert exact[name].rows == rows
        assert exact[name].gap <= gap


def changed_numbers(random, array):
    """One way to change a tensor."""
    array = array.copy()
    flat = array.reshape(-1)
    if not len(flat):
        return array
    at, kind = int(random.integers(len(flat))), int(random.integers(6))
    with np.errstate(all="ignore"):
        if kind == 0:
            return (array * array.dtype.type(random.choice([0, 2, 100]))).astype(array.dtype)
        if kind == 1:
            return (~array if array.dtype == bool else 0 - array).astype(array.dtype)
        if kind == 2:
            flat[at] = np.array(random.choice([np.inf, np.nan, 1e300, -1e300])).astype(array.dtype)
        elif kind == 3:
            return array[::-1].copy()
        elif kind == 4:
            return np.concatenate([array, array[:1]]) if array.ndim else array
        else:
            flat[at] = flat[int(random.integers(len(flat)))]
    return array


def changed_record(random, record):
    """Change, drop or exchange one entry, anywhere."""
    places = []

    def walk(value):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(record)
    holder, key = places[int(random.integers(len(places)))]
    kind = int(random.integers(4))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * float(random.choice([-1, 0, 0.5, 1e300]))
    else:
        other, at = places[int(random.integers(len(places)))]
        holder[key] = json.loads(json.dumps(other[at])) if kind == 2 and at in other else None
    return record


def forge_anything(folder, random):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = files[int(random.integers(len(files)))]
    kind = int(random.integers(6))
    if kind == 0:
        data = bytearray(file.read_bytes())
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
    elif kind == 1:
        data = file.read_bytes()
        file.write_bytes(data[: int(random.integers(len(data)))])
    elif kind == 2:
        other = files[int(random.integers(len(files)))]
        data = other.read_bytes()
        other.write_bytes(file.read_bytes())
        file.write_bytes(data)
    elif kind == 3 or file.suffix == ".json":
        record = folder / "mipprune.json"
        record.write_text(json.dumps(changed_record(random, json.loads(record.read_text()))))
    else:
        tensors, metadata = load_file(file), checker_folder.read_tensors(file)[1]
        names = sorted(tensors)
        one, other = (names[int(random.integers(len(names)))] for _ in range(2))
        if kind == 4:
            tensors[one], tensors[other] = tensors[other], tensors[one]
        else:
            tensors[one] = changed_numbers(random, tensors[one])
        save_file(tensors, file, metadata=metadata or None)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32))
def test_random_forgeries_prove_nothing_more(small, seed):
    honest = check_folder(small)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(small, folder)
        forge_anything(folder, np.random.default_rng(seed))
        try:
            found = check_folder(folder)
        except InvalidInput:
            return
    assert found.keys() <= honest.keys()
    assert (found.layers, found.rows) == (honest.layers, honest.rows)
    for name, (rows, gap) in found.items():
        assert rows <= honest[name].rows
        assert gap >= honest[name].gap - 2e-6


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "granitemoe", "gpt_oss"])
def test_weights_are_found_however_they_are_stored(tmp_path, embedded, family):
    """Transposed, one tensor per expert or all in one, under the model's names or others."""
    model = tiny_model(family)
    rules = Rules(PerRow(sparsity=0.5), only=("*.1.*",))
    report = mipprune.prune(model, None, WINDOWS, rules, samples=8, solver="wanda")
    folder = tmp_path / "model"
    mipprune.save(folder, model, embedded.tokenizer, report)
    fresh = LoadedModel(tiny_model(family), None, torch.float32)
    results = certify(folder, rows=1, row_seconds=0.01, model=fresh, calibration=WINDOWS)
    checked = check_folder(folder)
    assert len(checked) == len(results) == checked.layers
    forgery = Forgery(folder, results[0].name)
    tensor = results[0].stored[0]["tensor"]
    forgery.tensors("model.safetensors", lambda t: {tensor: 2 * t[tensor]})
    with pytest.raises(InvalidInput, match="kept weights"):
        check_folder(folder)


def test_weights_are_compared_in_the_type_they_are_stored_in(tmp_path, embedded):
    model = tiny_model("llama")
    rules = Rules(PerRow(sparsity=0.5), only=(Q,))
    report = mipprune.prune(model, None, WINDOWS, rules, samples=8, solver="wanda")
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        mipprune.save(folder, tiny_pruned(model), embedded.tokenizer, report, dtype)
        certify(folder, rows=1, row_seconds=0.01, model=dense(), calibration=WINDOWS)
        assert check_folder(folder).keys() == {Q}


def tiny_pruned(model):
    """The same weights again, since saving converts in place."""
    again = tiny_model("llama")
    again.load_state_dict(model.state_dict())
    return again


def test_gaps_that_are_no_bound_are_called_so():
    from mipprune.results import certified_text, gap_text

    one = {"gap": 0.25, "bound": 0.75, "loss": 1.0, "rows": [0, 1]}
    none = {"gap": 1.5, "bound": -0.5, "loss": 1.0, "rows": [0, 1]}
    linear = {**none, "digests": [{"linear": "abc"}]}
    zero = {"gap": 0.0, "bound": 0.0, "loss": 0.0, "rows": [0]}
    assert [gap_text(c) for c in (one, none, linear, zero)] == [
        "25.00%", "no bound", "150.00%", "0.00%",
    ]  # fmt: skip
    layers = [{"rows": 5184, "certificate": one}, {"rows": 5184, "certificate": none}]
    text = certified_text({"layers": layers})
    assert text.startswith("Certified: 2 of 2 layers, 4 of 10 368 rows; gaps of layers: 25.00% to")
    assert "no bound (1 of 2 layers have none)" in text
    assert checker_folder.NOT_PROVEN in text
    assert certified_text({"layers": [{"rows": 3}]}) == ""


def test_all_rows_have_no_margin(tmp_path, embedded):
    folder = pruned(tmp_path / "m", embedded, NM(2, 4))
    results = certify(folder, rows=None, row_seconds=0.01, model=dense(), calibration=WINDOWS)
    assert results[0].rows == list(range(32))
    assert results[0].margin == results[0].gap_margin == 0.0


def test_a_budget_per_layer_is_certified_at_a_price(tmp_path, embedded):
    folder = pruned(tmp_path / "layer", embedded, PerLayer(sparsity=0.5))
    results = certify(folder, rows=3, row_seconds=0.01, model=dense(), calibration=WINDOWS)
    verified = check_folder(folder)
    for result in results:
        assert result.bound <= result.loss
        assert result.price is not None
        assert result.gap_margin > 0
        assert verified[result.name][1] == pytest.approx(result.gap, abs=1e-9)
    name = results[0].name
    masks = mipprune.load_masks(folder)
    masks[name][results[0].rows[0]] = True
    mipprune.checkpoint.save_masks(folder / "masks.safetensors", masks)
    with pytest.raises(InvalidInput, match="hash of the masks"):
        check_folder(folder)
    record = json.loads((folder / "mipprune.json").read_text())
    record["mask_hash"] = mipprune.record.mask_digest(masks)
    (folder / "mipprune.json").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match=f"Layer {name}: The mask does not follow"):
        check_folder(folder)


def test_runs_that_cannot_be_repeated_are_refused(certified, tmp_path, embedded):
    folder = copied(certified, tmp_path)
    other = Windows(tiny_tokens(windows=8, length=32, seed=1), "other")
    with pytest.raises(InvalidInput, match="gives other tokens"):
        certify(folder, rows=1, model=dense(), calibration=other)
    wrong = LoadedModel(tiny_model("llama", seed=1), None, torch.float32)
    with pytest.raises(InvalidInput, match="in the record"):
        certify(folder, rows=1, model=wrong, calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="does not name its model"):
        certify(folder, rows=1, calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="certify nothing"):
        certify(folder, rows=0, model=dense(), calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="no pruned model's folder"):
        certify(tmp_path)
    fresh = pruned(tmp_path / "fresh", embedded, solver="wanda")
    with pytest.raises(InvalidInput, match="has no certificates"):
        check_folder(fresh)


def test_samples_and_margins():
    assert _sample(5, None, (0,)) == _sample(5, 9, (0,)) == [0, 1, 2, 3, 4]
    assert _sample(100, 4, (0, 1)) == _sample(100, 4, (0, 1)) != _sample(100, 4, (0, 2))
