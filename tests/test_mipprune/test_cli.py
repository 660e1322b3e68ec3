import itertools
import json
import subprocess
import sys

import pytest
import torch

import mipprune
from mipprune.cli.options import parse_options, parse_pattern
from solvers import MaskProblem, PerLayer, PerRow, solve

FAST = ["--samples", "4", "--seqlen", "64"]


def test_prune_then_evaluate(run, tmp_path):
    out = tmp_path / "pruned"
    prune = ["prune", "embedded", "--sparsity", "0.6", "--solver", "swap", "--out", out]
    code, printed, _ = run(*prune, *FAST)
    assert code == 0
    assert "mlp.down_proj" in printed
    assert "mask hash" in printed
    record = json.loads((out / "mipprune.json").read_text())
    assert record["settings"]["model"] == "embedded"
    assert record["settings"]["start"] == "wanda"
    for name, samples in (("a", "4"), ("b", "4")):
        code, printed, _ = run(
            "evaluate", out, "--samples", samples, "--seqlen", "64", "--json", tmp_path / name
        )
        assert code == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert first == second
    assert f"{first['perplexity']:.4f}" in printed
    assert "4 windows of 64 tokens, not overlapping" in printed
    assert first["predicted_tokens"] == 4 * 63


def test_what_is_chosen_by_default_is_said(run, tmp_path):
    (plain, shrunk), chosen = (tmp_path / name for name in "ab"), tmp_path / "c"
    prune = ["prune", "embedded", "--pattern", "2:4", "--only", "*.0.*", *FAST, "--out"]
    code, printed, _ = run(*prune, chosen)
    assert code == 0
    assert "Chosen by default" in printed
    assert "Chosen by default" not in run(*prune, plain, "--solver", "swap")[1]
    both = ["--solver", "alps", "--update", "least_squares"]
    assert "Chosen by default" not in run(*prune, shrunk, *both)[1]
    records = [json.loads((out / "mipprune.json").read_text()) for out in (plain, shrunk, chosen)]
    steps = [record["settings"]["layer_step"] for record in records]
    assert steps[0]["update"] == "none"
    assert records[1]["mask_hash"] == records[2]["mask_hash"] != records[0]["mask_hash"]
    assert steps[1] == steps[2]


def test_a_sparsity_is_shared_out_by_default(run, tmp_path):
    small = ["--only", "*.0.self_attn.k_proj", "--only", "*.0.self_attn.v_proj"]
    prune = ["prune", "embedded", "--sparsity", "0.5", *small, *FAST, "--out"]
    code, printed, _ = run(*prune, tmp_path / "a")
    assert code == 0
    assert "An integer program shares out the sparsity" in " ".join(printed.split())
    record = json.loads((tmp_path / "a" / "mipprune.json").read_text())
    assert record["settings"]["allocation"]["method"] == "integer_program"
    assert record["recipe"]["allocate"] == "integer_program"
    assert run("prune", "--config", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b")[0] == 0
    again = json.loads((tmp_path / "b" / "mipprune.json").read_text())
    assert again["mask_hash"] == record["mask_hash"]

    for more in (["--allocate", "uniform"], ["--solver", "wanda"], ["--rule", "*v_proj=0.6"]):
        code, printed, _ = run(*prune, tmp_path / "c", *more, "--dry-run")
        assert code == 0
        assert "Besides, the allocation" not in printed


def test_a_sparsity_that_cannot_be_shared_out_is_said(run, tmp_path):
    small = ["--only", "*.0.self_attn.k_proj"]
    prune = ["prune", "embedded", *small, *FAST, "--out", tmp_path / "a"]
    code, _, errors = run(*prune, "--sparsity", "0.97")
    assert code == 0
    assert "All layers get the same sparsity." in errors
    record = json.loads((tmp_path / "a" / "mipprune.json").read_text())
    assert record["settings"]["allocation"] is None
    assert run("prune", "--config", tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "c")[0] == 0
    again = json.loads((tmp_path / "c" / "mipprune.json").read_text())
    assert again["mask_hash"] == record["mask_hash"]
    refused = [*prune[:-1], tmp_path / "b", "--allocate", "integer_program", "--sparsity", "0.97"]
    code, _, errors = run(*refused)
    assert code == 2
    assert "needs bounds" in errors


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["--pattern", "2:4"], lambda mask: (mask.reshape(-1, 4).sum(dim=1) == 2).all()),
        (
            ["--sparsity", "0.5", "--scope", "layer"],
            lambda mask: mask.sum() == mask.numel() // 2 and len(set(mask.sum(dim=1).tolist())) > 1,
        ),
    ],
)
def test_patterns(run, tmp_path, arguments, counts):
    out = tmp_path / "out"
    assert run("prune", "embedded", *arguments, "--out", out, "-O", "max_passes=3", *FAST)[0] == 0
    assert all(counts(mask) for mask in mipprune.load_masks(out).values())
    record = json.loads((out / "mipprune.json").read_text())
    assert record["settings"]["solver_options"] == {"max_passes": 3}


RECIPE = """
model: embedded
sparsity: 0.5
rule: {"*.down_proj": 2:4}
ignore: ["*.k_proj"]
option: {max_passes: 2}
samples: 4
seqlen: 64
batch-size: 2
"""


def test_a_recipe_equals_the_command_line(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = ["--sparsity", "0.5", "--rule", "*.down_proj=2:4", "--ignore", "*.k_proj"]
    arguments += ["-O", "max_passes=2", "--batch-size", "2", *FAST]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    recipe = ["prune", "--config", tmp_path / "recipe.yaml"]
    code, printed, _ = run(*recipe, "--out", one, "--log", tmp_path / "log")
    assert code == 0
    assert "batch-size: 2" in printed
    assert run("prune", "embedded", "--out", two, *arguments, "--quiet")[:2] == (0, "")
    # what was saved with the result is a recipe, and the command line wins over it
    code, printed, errors = run(
        "prune", "--config", one / "recipe.yaml", "--out", three, "--seed", "1", "--verbose"
    )
    assert code == 0
    assert "model.layers.0.mlp.down_proj [256 x 704] 50.0% removed" in errors
    records = [json.loads((out / "mipprune.json").read_text()) for out in (one, two, three)]
    assert records[0]["mask_hash"] == records[1]["mask_hash"] != records[2]["mask_hash"]
    assert {key for key in records[0]["recipe"] if key not in ("config", "verbose")} == {
        "model", "out", "sparsity", "scope", "solver", "option", "samples", "seqlen", "grams",
        "batch_size", "device", "dtype", "seed", "rule", "ignore", "update", "shrink", "centre",
        "targets", "bias", "tokens", "row_groups",
    }  # fmt: skip
    assert records[0]["settings"] == records[1]["settings"]
    differing = {k: v for k, v in records[2]["settings"].items() if v != records[0]["settings"][k]}
    assert differing == {"seed": 1}
    assert not any("k_proj" in name for name in mipprune.load_masks(one))
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "recipe"
    assert kinds[-1] == "end"
    assert kinds.count("layer") == 36
    assert events[-1]["mask_hash"] == records[0]["mask_hash"]
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(events))


def test_an_allocation_repeats_from_its_recipe(run, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    prune = ["prune", "embedded", "--sparsity", "0.6", "--solver", "wanda", *FAST]
    code, _, error = run(*prune, "--allocate", "owl", "--only", "*.mlp.*", "--out", first)
    assert code == 0, error
    assert run("prune", "embedded", "--config", first / "recipe.yaml", "--out", again)[0] == 0
    records = [json.loads((out / "mipprune.json").read_text()) for out in (first, again)]
    assert records[0]["mask_hash"] == records[1]["mask_hash"]
    assert len({layer["sparsity"] for layer in records[0]["layers"]}) > 1
    assert "allocated to layers by owl" in (first / "README.md").read_text()
    code, _, error = run(
        "prune", "embedded", "--pattern", "2:4", "--allocate", "owl", "--out", tmp_path / "no"
    )
    assert code == 2
    assert "the pattern is 2:4; give --sparsity, or leave --allocate out." in error


def test_what_is_held_out_and_chosen_by_it_repeats_from_its_recipe(run, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    prune = ["prune", "embedded", "--sparsity", "0.6", "--only", "*.0.*.k_proj", *FAST]
    chosen = ["--held-out", "0.25", "--choose", "shrink=0,0.5", "--solver", "swap"]
    code, printed, error = run(*prune, *chosen, "--out", first)
    assert code == 0, error
    assert "held out / own" in printed
    assert run("prune", "embedded", "--config", first / "recipe.yaml", "--out", again)[0] == 0
    records = [json.loads((out / "mipprune.json").read_text()) for out in (first, again)]
    assert records[0]["mask_hash"] == records[1]["mask_hash"]
    assert records[0]["held_out_loss"] == records[0]["layers"][0]["held_out_updated_loss"] > 0
    assert records[0]["settings"]["choice"] == {
        "option": "shrink", "values": [0, 0.5], "scope": "layer"
    }  # fmt: skip


def test_targets_of_the_dense_model_repeat_from_their_recipe(run, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    prune = ["prune", "embedded", "--pattern", "2:4", "--only", "*.mlp.*", *FAST]
    aimed = ["--grams", "sequential", "--targets", "stream:0.5", "--bias", "existing"]
    aimed += ["--solver", "wanda", "--update", "least_squares"]
    assert run(*prune, *aimed, "--out", first)[0] == 0
    assert run("prune", "embedded", "--config", first / "recipe.yaml", "--out", again)[0] == 0
    records = [json.loads((out / "mipprune.json").read_text()) for out in (first, again)]
    assert records[0]["layers"] == records[1]["layers"]
    step = records[0]["settings"]["layer_step"]
    assert (step["surrogate"]["dense_targets"], step["surrogate"]["stream"]) == (0.5, True)
    assert records[0]["settings"]["grams"] == "sequential"
    assert run(*prune, *aimed, "--out", tmp_path / "new", "--dry-run")[0] == 0


def test_a_time_budget_is_recorded(run, tmp_path):
    prune = ["prune", "embedded", "--sparsity", "0.6", "--only", "*.0.*.k_proj", *FAST]
    code, printed, error = run(
        *prune, "--solver", "swap", "--time-budget", "1h", "--out", tmp_path / "out"
    )
    assert code == 0, error
    assert "time-budget: 1h" in printed
    assert "a repeat may choose others" in error
    record = json.loads((tmp_path / "out" / "mipprune.json").read_text())
    assert record["settings"]["time_budget"] == 3600.0
    code, _, error = run(*prune, "--time-budget", "soon", "--out", tmp_path / "no")
    assert code == 2
    assert "'soon' is no time" in error


def test_recipes_that_say_nonsense_are_refused(run, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    for text, message in [
        ("model: embedded\nsparsty: 0.5", "no option 'sparsty'"),
        ("model: embedded\nconfig: x", "no option 'config'"),
        ("model: embedded\nsparsity: much", "Invalid value for '--sparsity'"),
        ("model: embedded\nsparsity: 0.5\nrule: {'*.fc1': 0.6}", "No layer is named '*.fc1'"),
        ("sparsity: 0.5", "Missing argument"),
        ("model: [", "is not YAML"),
    ]:
        recipe.write_text(text)
        code, _, errors = run("prune", "--config", recipe, "--out", out)
        assert code == 2
        assert message in errors
    assert not out.exists()


def test_a_failed_run_says_so_in_its_log(run, tmp_path):
    arguments = ["prune", "embedded", "--sparsity", "0.5", "--out", tmp_path / "out"]
    log = tmp_path / "log"
    code, _, _ = run(*arguments, "--calibration", "no.txt", "--log", log)
    assert code == 2
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["kind"]) == ("error", "InvalidInput")
    code, _, errors = run(*arguments, "--log", tmp_path / "no" / "log")
    assert code == 2
    assert "cannot be written" in errors


def test_evaluate_against_the_dense_model_and_report(run, tmp_path):
    out = tmp_path / "out"
    assert run("prune", "embedded", "--pattern", "2:4", "--solver", "wanda", "--out", out, "-q",
               *FAST)[0] == 0  # fmt: skip
    evaluate = ["evaluate", out, "--against", "embedded", *FAST, "--json", tmp_path / "json"]
    code, printed, _ = run(*evaluate, "--stride", "16", "--save")
    assert code == 0
    assert "same top token" in printed
    record = json.loads((tmp_path / "json").read_text())
    # 4 windows of 64 tokens are 256 tokens of text, every one but the first predicted once
    assert record["predicted_tokens"] == 255
    assert record["against"]["kl"]["mean"] > 0
    assert 0.3 < record["against"]["agreement"]["mean"] < 1
    assert record["perplexity"] > record["against"]["perplexity"] > 1
    assert f"{record['perplexity']:.3f}" in (out / "README.md").read_text()
    code, printed, _ = run("report", out)
    assert code == 0
    assert f"{record['perplexity']:.3f}" in (out / "report.html").read_text()
    code, _, errors = run("evaluate", "embedded", *FAST, "--save")
    assert code == 2
    assert "no mipprune.json in embedded" in errors


def test_tokens_are_a_calibration_text(run, tmp_path):
    file, one, two = tmp_path / "t.safetensors", tmp_path / "one", tmp_path / "two"
    assert run("tokens", "embedded", "--out", file, *FAST)[0] == 0
    prune = ["prune", "embedded", "--pattern", "2:4", "--solver", "wanda", *FAST]
    assert run(*prune, "--out", one, "--token-cache", tmp_path / "cache")[0] == 0
    assert run(*prune, "--out", two, "--calibration", file)[0] == 0
    records = [json.loads((out / "mipprune.json").read_text()) for out in (one, two)]
    assert records[0]["mask_hash"] == records[1]["mask_hash"]
    assert records[0]["calibration"]["sha256"] == records[1]["calibration"]["sha256"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_run_goes_on_where_it_was_interrupted(run, tmp_path, monkeypatch):
    from mipprune.journal import FileJournal

    out, arguments = tmp_path / "out", ["--sparsity", "0.6", "--solver", "wanda", *FAST]
    append, records = FileJournal._append, []

    def stop(self, payload):
        append(self, payload)
        records.append(payload)
        if len(records) == 9:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(FileJournal, "_append", stop)
        with pytest.raises(MemoryError):
            run("prune", "embedded", "--out", out, *arguments)
    code, _, errors = run("prune", "embedded", "--out", out, *arguments)
    assert code == 2
    assert "give --resume" in errors
    assert run("prune", "embedded", "--out", out, "--resume", *arguments)[0] == 0
    assert run("prune", "embedded", "--out", tmp_path / "whole", "--stream", *arguments)[0] == 0
    records = [
        json.loads((tmp_path / name / "mipprune.json").read_text()) for name in ("out", "whole")
    ]
    recipes = [record.pop("recipe") for record in records]
    assert "resume" not in recipes[0]
    assert records[0] == records[1]


def test_problem_writes_a_layer(run, tmp_path):
    out = tmp_path / "layer.safetensors"
    layer = "model.layers.2.mlp.down_proj"
    code, printed, _ = run("problem", "embedded", layer, "--out", out, *FAST)
    assert code == 0
    assert "256 rows, 704 inputs" in printed
    problem = MaskProblem.load(out, PerRow(sparsity=0.6))
    start = solve(problem, "wanda").objective.sum()
    assert float(solve(problem, "swap").objective.sum()) < 0.7 * float(start)


def test_demo_writes_table_json_and_picture(run, tmp_path):
    code, printed, _ = run("demo", "--out", tmp_path, "--samples", "2", "--row-seconds", "0.5")
    assert code == 0
    assert "wanda + swap" in printed
    record = json.loads((tmp_path / "demo.json").read_text())
    assert [row["method"] for row in record["rows"][1:]] == [
        "magnitude", "wanda", "ria", "wanda + swap",
    ] * 2  # fmt: skip
    assert record["rows"][0]["pattern"] == "dense"
    assert all(row["perplexity"] > 1 for row in record["rows"])
    assert record["rows"][4]["relative_loss"] < 1 == record["rows"][2]["relative_loss"]
    gaps = [row["certified_gap"] for row in record["rows"][1:5]]
    assert 0 <= gaps[3] == min(gaps) < max(gaps) < 1
    assert [row["evidence"] for row in record["rows"]] == [None, *["certified"] * 8]
    assert "certified: A witness" in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_solvers_are_listed(run):
    assert "candidates" in run("solvers", "swap")[1]
    code, printed, _ = run("solvers")
    assert code == 0
    assert "swap" in printed
    assert "PerRow, NM, PerLayer" in printed


PRUNE = ["prune", "embedded", "--out", "OUT"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PRUNE], "either --sparsity"),
        ([*PRUNE, "--sparsity", "0.5", "--pattern", "2:4"], "either --sparsity"),
        ([*PRUNE, "--sparsity", "1.0"], "outside (0, 1)"),
        ([*PRUNE, "--sparsity", "0"], "outside (0, 1)"),
        ([*PRUNE, "--pattern", "4:4"], "kept number must be in 1..3"),
        ([*PRUNE, "--pattern", "1:5"], "divisible by 5"),
        ([*PRUNE, "--pattern", "2:4", "--scope", "layer"], "has no scope"),
        ([*PRUNE, "--sparsity", "0.5", "--scope", "world"], "neither row nor layer"),
        ([*PRUNE, "--sparsity", "0.5", "--solver", "magic"], "no solver 'magic'"),
        ([*PRUNE, "--sparsity", "0.5", "--start", "magic"], "no solver 'magic'"),
        ([*PRUNE, "--sparsity", "0.5", "-O", "magic=1"], "no option 'magic'"),
        ([*PRUNE, "--sparsity", "0.5", "-O", "magic"], "not of the form name=value"),
        ([*PRUNE, "--sparsity", "0.5", "-O", "candidates=0"], "at least 1"),
        ([*PRUNE, "--sparsity", "0.5", "--grams", "both"], "'sequential' or 'dense'"),
        ([*PRUNE, "--sparsity", "0.5", "--targets", "both"], "own, dense or stream"),
        ([*PRUNE, "--sparsity", "0.5", "--bias", "new"], "none of none, existing"),
        (
            [*PRUNE, "--sparsity", "0.5", "--targets", "dense", "--solver", "wanda"],
            "knows no linear term",
        ),
        ([*PRUNE, "--sparsity", "0.5", "--blocks", "magic"], "no list of blocks named"),
        ([*PRUNE, "--sparsity", "0.5", "--device", "abacus"], "Device 'abacus' is unknown"),
        ([*PRUNE, "--sparsity", "0.5", "--calibration", "no.txt"], "no text file at no.txt"),
        ([*PRUNE, "--sparsity", "0.5", "--calibration", "SHORT"], "less than one window"),
        ([*PRUNE, "--sparsity", "0.5", "--calibration", "EMPTY"], "is empty"),
        ([*PRUNE, "--sparsity", "0.5", "--samples", "0"], "nothing to predict"),
        (["prune", "./no-model", "--out", "OUT", "--sparsity", "0.5"], "no model folder"),
        (["prune", "VIT", "--out", "OUT", "--sparsity", "0.5"], "no causal language model"),
        (["prune", "embedded", "--out", ".", "--sparsity", "0.5"], "exists already"),
        (["evaluate", "./no-model"], "no model folder"),
        (["evaluate", "embedded", "--text", "no.txt"], "no text file"),
        (["time-2to4", ".", "--batches", "0,a"], "positive numbers"),
        (["report", "."], "no mipprune.json"),
        (["tokens", "embedded", "--out", "OUT"], "end in .safetensors"),
        ([*PRUNE, "--sparsity", "0.5", "--rule", "*=half"], "neither a sparsity"),
        ([*PRUNE, "--sparsity", "0.5", "--start", "./none"], "neither a solver nor the folder"),
        ([*PRUNE, "--sparsity", "0.5", "-q", "-v"], "not both"),
        (["problem", "embedded", "magic", "--out", "OUT"], "no prunable layer 'magic'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(run, tmp_path, arguments, message):
    files = tmp_path / "files"
    (files / "vit").mkdir(parents=True)
    (files / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (files / "short.txt").write_text("short")
    (files / "empty.txt").write_text("")
    names = {
        "OUT": tmp_path / "out",
        "SHORT": files / "short.txt",
        "EMPTY": files / "empty.txt",
        "VIT": files / "vit",
    }
    code, printed, errors = run(*(names.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in errors
    assert errors.count("Error:") == 1
    assert "Traceback" not in errors
    assert "Written" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


def test_a_model_with_nan_weights_is_refused(run, tmp_path, embedded):
    with torch.no_grad():
        embedded.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    embedded.model.save_pretrained(tmp_path / "nan")
    embedded.tokenizer.save_pretrained(tmp_path / "nan")
    code, _, errors = run(
        "prune", tmp_path / "nan", "--out", tmp_path / "out", "--sparsity", "0.5", *FAST
    )
    assert code == 2
    assert "model.layers.1.mlp.up_proj has NaN or infinite weights" in errors
    assert not (tmp_path / "out").exists()


def test_a_foreign_package_named_solvers_is_named(tmp_path):
    (tmp_path / "solvers.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import mipprune"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert str(tmp_path / "solvers.py") in done.stderr
    assert "rename that file" in done.stderr


def test_importing_is_light():
    heavy = ["transformers", "datasets", "numba", "matplotlib", "pyarrow"]
    code = (
        "import sys, solvers, mipprune, mipprune.cli; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_pattern_parsing():
    assert parse_pattern(0.5, None, "layer") == PerLayer(sparsity=0.5)
    assert parse_options(["a=1", "b=x", "c=true"]) == {"a": 1, "b": "x", "c": True}
