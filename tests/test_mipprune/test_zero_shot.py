import importlib.util
import json

import pytest

from mipprune.zero_shot import zero_shot
from solvers import InvalidInput

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: TASK
dataset_path: json
dataset_kwargs:
  data_files:
    test: ROWS
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    ("For more information, see the manual", [" page", " zqx"], 0),
    ("The options are as", [" kjw", " follows"], 1),
    ("This file is part", [" of", " xxq"], 0),
    ("It returns zero on success and", [" -1", " vbn"], 1),
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(
            json.dumps({"question": question, "choices": choices, "answer": answer})
            for question, choices, answer in QUESTIONS
        )
    )
    file = tmp_path / "task.yaml"
    file.write_text(TASK.replace("TASK", "little").replace("ROWS", str(rows)))
    return file


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_without_the_harness_the_extra_is_named(embedded, task):
    with pytest.raises(InvalidInput, match=r"pip install 'mipprune\[eval\]'"):
        zero_shot(embedded, [str(task)])


@pytest.mark.skipif(not INSTALLED, reason="needs lm-evaluation-harness (make test-extras)")
@pytest.mark.filterwarnings("default")
class TestWithTheHarness:
    def test_a_local_task_runs_offline(self, embedded, task):
        result = zero_shot(embedded, [str(task)])
        (little,) = result["tasks"].values()
        assert little["questions"] == 4
        # the last answer is wrong on purpose
        assert little["metrics"]["acc"] == 0.75
        assert little["metrics"].keys() >= {"acc", "acc_norm", "acc_stderr"}
        assert result["harness"]
        assert zero_shot(embedded, [str(task)], limit=3)["tasks"]["little"]["metrics"]["acc"] == 1

    def test_tasks_that_cannot_be_had_are_refused(self, embedded, tmp_path, task):
        with pytest.raises(InvalidInput, match="no task file"):
            zero_shot(embedded, [str(tmp_path / "none.yaml")])
        with pytest.raises(InvalidInput, match="no task 'no such task'"):
            zero_shot(embedded, ["no such task"])
        (tmp_path / "bad.yaml").write_text("a: b")
        with pytest.raises(InvalidInput, match="has no line 'task: NAME'"):
            zero_shot(embedded, [str(tmp_path / "bad.yaml")])
        (tmp_path / "rows.jsonl").unlink()
        with pytest.raises(InvalidInput, match="tasks little cannot be run here"):
            zero_shot(embedded, [str(task)])
