import pytest

from mipprune.recipe import read_recipe, recipe_text
from solvers import InvalidInput

KNOWN = {"model", "pattern", "samples", "batch_size", "option", "rule", "seed", "blocks"}


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(file, KNOWN, {"option", "rule"})


def test_values_are_what_the_command_line_would_say(tmp_path):
    got = read(
        tmp_path,
        """
        # a comment
        model: embedded
        pattern: 2:4
        batch-size: 016
        seed: null
        option: {max_passes: 3, step: 1:30}
        rule:
          "*.mlp.*": 0.5
          "re:.*q_proj": dense
        """,
    )
    assert got == {
        "model": "embedded",
        "pattern": "2:4",
        "batch_size": "016",
        "option": ["max_passes=3", "step=1:30"],
        "rule": ["*.mlp.*=0.5", "re:.*q_proj=dense"],
    }
    assert read(tmp_path, "rule:\n- a=0.5\n- b=2:4\n") == {"rule": ["a=0.5", "b=2:4"]}
    assert read(tmp_path, "") == read(tmp_path, "# nothing") == {}


def test_what_is_written_reads_the_same(tmp_path):
    values = {
        "model": "owner/näme: #1",
        "pattern": "2:4",
        "samples": 128,
        "blocks": None,
        "rule": ["*.mlp.*=0.5", "yes=dense"],
        "option": [],
        "seed": 0,
    }
    assert read(tmp_path, recipe_text(values)) == {
        "model": "owner/näme: #1",
        "pattern": "2:4",
        "samples": "128",
        "rule": ["*.mlp.*=0.5", "yes=dense"],
        "seed": "0",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5", "no option 'sparsty'; the options are batch-size, blocks, model"),
        ("model: a\nmodel: b", "'model' stands there twice"),
        ("batch-size: 1\nbatch_size: 2", "'batch_size' is given twice"),
        ("model: {a: b}", "value of 'model' holds more than plain text"),
        ("rule: {a: [b]}", "value of 'rule' holds more than plain text"),
        ("model: [a]", "'model' has one value, not a list"),
        ("model: [[a]]", "value of 'model' holds more than plain text"),
        ("- a\n- b", "holds no options"),
        ("just words", "holds no options"),
        ("model: [a", "is not YAML"),
        ("model: a: b", "is not YAML"),
        ("model:\t- x\n\tb", "is not YAML"),
        ("? [a, b]\n: c", "no name of an option"),
        ("model: !!python/object/apply:os.system ['true']", "has one value, not a list"),
        ("&a model: *b", "is not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[" * 500, "is not YAML"),
    ],
)
def test_bad_recipes_are_one_sentence(tmp_path, text, message):
    with pytest.raises(InvalidInput, match=message) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml", KNOWN, ())
