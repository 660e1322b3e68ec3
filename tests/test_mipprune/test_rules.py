import json

import pytest
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import Rules
from mipprune.calibration import Windows
from mipprune.rules import parse_rule
from solvers import NM, InvalidInput, PerLayer, PerRow

WINDOWS = Windows(tiny_tokens(), "random")
HALF, MOST = PerRow(sparsity=0.5), PerRow(sparsity=0.75)


def test_the_first_rule_wins_and_ignore_beats_all():
    rules = Rules(
        HALF,
        ((r"re:.*\.[01]\.mlp\..*", MOST), ("*.mlp.*", NM(2, 4)), ("*.o_proj", None)),
        ignore=("*.2.*",),
    )
    expected = {
        "model.layers.0.mlp.up_proj": MOST,
        "model.layers.10.mlp.up_proj": NM(2, 4),
        "model.layers.2.mlp.up_proj": None,
        "model.layers.0.self_attn.o_proj": None,
        "model.layers.0.self_attn.q_proj": HALF,
    }
    assert {name: rules.pattern_for(name) for name in expected} == expected
    only = Rules(HALF, only=("*.mlp.*",))
    assert [only.pattern_for(name) for name in expected] == [HALF, HALF, HALF, None, None]


def test_names_are_matched_whole():
    rules = Rules(HALF, (("mlp", MOST), ("MODEL.*", MOST), ("re:model", MOST)))
    assert rules.pattern_for("model.layers.0.mlp.up_proj") == HALF
    experts = Rules(HALF, (("*.experts.up[3]", MOST),))
    assert experts.pattern_for("a.experts.up[3]") == MOST
    assert experts.pattern_for("a.experts.up3") == HALF


def test_rules_survive_the_record():
    rules = Rules(HALF, (("a*", None), ("b", PerLayer(sparsity=0.3))), ("c",), ("*",))
    assert Rules.from_dict(json.loads(json.dumps(rules.to_dict()))) == rules
    assert Rules.of_settings({"pattern": NM(2, 4).to_dict()}) == Rules(NM(2, 4))


def test_rules_as_text():
    assert parse_rule("*.mlp.*=0.5") == ("*.mlp.*", HALF)
    assert parse_rule("a = 0.5", "layer") == ("a", PerLayer(sparsity=0.5))
    assert parse_rule("re:a=?b=2:4") == ("re:a=?b", NM(2, 4))
    assert parse_rule("a=dense") == ("a", None)
    for text in ("a", "=0.5", "a="):
        with pytest.raises(InvalidInput, match="form NAME=PATTERN"):
            parse_rule(text)
    with pytest.raises(InvalidInput, match="'half' is neither a sparsity"):
        parse_rule("a=half")
    with pytest.raises(InvalidInput, match=r"outside \(0, 1\)"):
        parse_rule("a=1.5")
    with pytest.raises(InvalidInput, match="no regular expression"):
        Rules(HALF, ignore=("re:(",))


def test_a_run_follows_its_rules():
    rules = Rules(
        HALF, (("*.down_proj", NM(1, 4)), ("*.0.mlp.*", MOST)), ignore=("*.self_attn.k_proj",)
    )
    model = tiny_model("llama")
    report = mipprune.prune(model, None, WINDOWS, rules)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["model.layers.0.mlp.down_proj"].sparsity == 0.75
    assert by_name["model.layers.0.mlp.up_proj"].sparsity == 0.75
    assert by_name["model.layers.1.mlp.up_proj"].sparsity == 0.5
    assert not any("k_proj" in name for name in by_name)
    zero = 1 - sum(int(mask.sum()) for mask in mipprune.zero_pattern(model).values()) / (
        report.coverage.prunable
    )
    assert report.sparsity == pytest.approx(zero, abs=1e-12)
    assert Rules.of_settings(report.to_dict()["settings"]) == rules


def test_rules_that_name_nothing_are_refused():
    with pytest.raises(InvalidInput, match=r"No layer is named '\*\.fc1'"):
        mipprune.prune(tiny_model("llama"), None, WINDOWS, Rules(HALF, (("*.fc1", MOST),)))
    with pytest.raises(InvalidInput, match="every layer dense"):
        mipprune.prune(tiny_model("llama"), None, WINDOWS, Rules(HALF, ignore=("*",)))
    with pytest.raises(InvalidInput, match="divisible by 5"):
        mipprune.prune(
            tiny_model("llama"), None, WINDOWS, Rules(HALF, (("*.down_proj", NM(2, 5)),))
        )
