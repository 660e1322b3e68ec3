import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import Allocation, LayerStep, Rules, Surrogate, Windows
from mipprune.evaluate import perplexity, side_by_side
from mipprune.html_report import html_report
from mipprune.results import (
    add_evaluation,
    by_kind,
    evaluation_record,
    model_card,
    place,
    read_record,
    summed,
    write_report,
)
from solvers import NM, InvalidInput, PerRow

WINDOWS = Windows(tiny_tokens(), "some <text> & more")
TASKS = {
    "harness": "0.4",
    "limit": None,
    "tasks": {
        "little": {
            "version": 1,
            "shots": 0,
            "questions": 4,
            "metrics": {"acc": 0.75, "acc_stderr": 0.25},
        }
    },
}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting; collects attributes, and the cells of every table."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tables, self.titles = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture(scope="module")
def record():
    dense, model = tiny_model("llama"), tiny_model("llama")
    rules = Rules(PerRow(sparsity=0.5), (("*.mlp.*", NM(1, 4)),), ignore=("*.0.mlp.up_proj",))
    report = mipprune.prune(model, None, WINDOWS, rules)
    report.settings["model"] = "owner/<model>"
    record = json.loads(json.dumps(report.to_dict()))
    both = evaluation_record("here", WINDOWS, side_by_side(dense, model, WINDOWS), "dense")
    record["evaluations"] = [both, {"model": "here", "tasks": TASKS, "against": {"tasks": TASKS}}]
    return record


def certified(record):
    record = copy.deepcopy(record)
    for layer in record["layers"][:5]:
        loss = layer["loss"]
        layer["certificate"] = {"loss": loss / 2, "bound": loss / 2 * 0.9, "gap": 0.1, "rows": [0]}
    return record


def test_sums_are_of_what_they_say(record):
    layers = certified(record)["layers"]
    total = summed(layers)
    size = [layer["rows"] * layer["inputs"] for layer in layers]
    assert total.weights == sum(size)
    assert total.loss == sum(layer["loss"] for layer in layers)
    energy = sum(layer["loss"] / layer["relative_error"] for layer in layers)
    assert total.relative_error == pytest.approx(total.loss / energy)
    assert total.gap == pytest.approx(0.1)
    assert summed(record["layers"]).gap is None
    assert summed(record["layers"][:1]).relative_error == pytest.approx(
        record["layers"][0]["relative_error"]
    )


def test_layers_have_a_place(record):
    assert place(record, "model.layers.12.mlp.up_proj") == ("12", "mlp.up_proj")
    assert place(record, "model.layers.1.mlp.experts.7.w1") == ("1", "mlp.experts.*.w1")
    assert place(record, "model.layers.1.mlp.experts.up[7]") == ("1", "mlp.experts.up[*]")
    assert len(by_kind(record)["mlp.up_proj"]) == 2


def test_the_report_is_one_whole_page_with_no_reference(record):
    text = html_report(certified(record), {"seconds": 75.0, "layers": {}})
    page = Page(text)
    assert "<model>" not in text.replace("&lt;model&gt;", "")
    assert "some &lt;text&gt; &amp; more" in text
    names = {name for _, name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "action", "data", "onload", "onclick"})
    assert not re.search(r"url\(|@import|https?:|<script|<link|<iframe", text)
    assert any(value and "default-src 'none'" in value for _, _, value in page.attributes)
    heat, gaps = (
        next(table for table in page.tables if "block" in table[0][0] and size in table[1][1:])
        for size in (f"{record['layers'][0]['relative_error']:.1%}", "10.0%")
    )
    assert [row[0] for row in heat[1:]] == ["0", "1", "2"]
    assert heat[1][heat[0].index("mlp.up_proj")] == ""  # left dense
    assert gaps[2][heat[0].index("mlp.down_proj")] == ""  # not certified
    layers = next(table for table in page.tables if table[0][0] == "layer")
    assert [row[0] for row in layers[1:]] == [layer["name"] for layer in record["layers"]]
    assert "75.0 s" in text
    assert page.titles == [
        "Notes", "Perplexity", "Tasks", "Relative error by block and layer",
        "Certified gap by block and layer", "Layers", "Settings", "Calibration", "Environment",
    ]  # fmt: skip
    tasks = next(table for table in page.tables if table[0][:2] == ["task", "metric"])
    assert tasks[1] == ["little", "acc", "4", "0.7500", "0.7500 ± 0.2500"]


def test_a_bare_record_has_a_report_too(record):
    bare = {key: value for key, value in record.items() if key not in ("evaluations", "seconds")}
    bare["layers"] = [
        {key: value for key, value in layer.items() if key != "seconds"} | {"loss_start": None}
        for layer in record["layers"]
    ]
    page = Page(html_report(bare))
    assert "Perplexity" not in page.titles
    assert "Certified gap by block and layer" not in page.titles


def test_the_card_has_the_tables(record):
    card = model_card(certified(record))
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model" not in card  # no hub id
    first = record["evaluations"][0]
    assert f"{first['against']['perplexity']:.3f} | {first['perplexity']:.3f} |" in card
    assert "| acc | little, 0 shots | 0.7500 | 0.7500 |" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| all |"))
    assert f"{record['sparsity']:.1%}" in card
    assert row.endswith("| 10.00% |")
    for table in re.findall(r"(?:^\|.*\|\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    named = copy.deepcopy(record)
    named["settings"]["model"] = "owner/model-1B"
    assert "base_model: owner/model-1B\n" in model_card(named)
    assert "Besides" not in card
    step = LayerStep(Surrogate(shrink=0.5, tokens="inverse_norm"), "least_squares")
    settings = {"layer_step": step.to_dict(), "allocation": Allocation("owl").to_dict()}
    other = {**record, "settings": {**record["settings"], **settings}}
    assert (
        " Besides, the sparsity was shared out among the layers (owl); layers were judged with "
        "shrink 0.5, tokens inverse_norm; kept weights were fitted anew by least squares."
    ) in model_card(other)


def test_an_evaluation_replaces_an_earlier_one_of_its_kind(tmp_path, embedded):
    report = mipprune.prune(
        embedded.model, embedded.tokenizer, None, NM(2, 4), "wanda", samples=2, seqlen=32
    )
    mipprune.save(tmp_path / "out", embedded.model, embedded.tokenizer, report)
    out = tmp_path / "out"
    assert {"README.md", "mipprune.json"} <= {path.name for path in out.iterdir()}
    windows = Windows(torch.randint(3, 2000, (4, 32)), "random")
    for _ in range(2):
        result = perplexity(embedded.model, windows)
        add_evaluation(out, evaluation_record("out", windows, result))
    add_evaluation(
        out, evaluation_record("out", windows, perplexity(embedded.model, windows, stride=8))
    )
    assert [one["stride"] for one in read_record(out)["evaluations"]] == [None, 8]
    assert f"{result.perplexity:.3f}" in (out / "README.md").read_text()
    assert not (out / "report.html").exists()
    write_report(out, read_record(out))
    add_evaluation(out, {"model": "out", "tasks": TASKS})
    assert "little" in (out / "report.html").read_text()


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"no mipprune\.json"):
        read_record(tmp_path)
    for content in ("{", "[]", "{}"):
        (tmp_path / "mipprune.json").write_text(content)
        with pytest.raises(InvalidInput, match="is not"):
            read_record(tmp_path)
