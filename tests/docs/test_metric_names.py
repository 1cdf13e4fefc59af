"""The table of metric names is what runs write: the golden curves have every name, in the rows that
the table says."""

import json

import pytest

from benchmarks.golden import GOLDEN, RUNS
from recipes.compose import compose
from trainers.core import metric_names as names
from trainers.core.metric_names import METRICS, entry

# Names that golden files leave out, as their values are another's every time. The commands of the
# pages are run in tests/docs/test_commands.py, which reads these names in what they write.
NOT_RECORDED = {
    "time/rollout",
    "time/annotate",
    "time/update",
    "time/sync",
    "time/step",
    "time/eval",
    "perf/tokens_per_second",
    "perf/peak_memory_gib",
    "reward/timeouts",
    "reward/<function>/mean",
    "reward/<function>/failed",
    "eval/<data>/timeouts",
}
GROUPED = ("grpo", "hrpo")
SAMPLED = ("opd", "onpolicy_sft", *GROUPED)
# Whether a run with this config has the rows that the table names.
WRITERS = {
    names.EVERY_ROW: lambda c: True,
    names.EVERY_STEP: lambda c: True,
    names.SAMPLING: lambda c: c.trainer in SAMPLED,
    names.DISTILLING: lambda c: c.trainer in ("opd", "proactivellm", "offline_distillation"),
    names.TAUGHT: lambda c: c.trainer == "opd",
    names.SAME_TOKENS: lambda c: c.trainer == "opd" and c.teacher.tokenizer == "shared",
    names.OWN_TOKENS: lambda c: c.trainer == "opd" and c.teacher.tokenizer == "own",
    names.ONE_TEACHER: lambda c: WRITERS[names.SAME_TOKENS](c) and not c.teachers,
    names.NAMED_TEACHERS: lambda c: c.trainer == "opd" and bool(c.teachers),
    names.NAMED_REWARDS: lambda c: c.trainer == "opd" and bool(c.teachers),
    names.TOKEN_REWARDS: lambda c: c.trainer in ("opd", "offline_distillation", *GROUPED),
    names.ALL_REWARDS: lambda c: c.trainer in ("offline_distillation", *SAMPLED),
    names.TEACHER_REWARDS: lambda c: (
        c.trainer == "opd" and c.objective == "policy_gradient" and not WRITERS[names.MIXED](c)
    ),
    names.SELECTING: lambda c: c.trainer == "opd" and c.reward.select.score is not None,
    names.MIXED: lambda c: c.trainer == "opd" and c.reward.task_weight > 0,
    names.GROUPS: lambda c: c.trainer in GROUPED or WRITERS[names.MIXED](c),
    names.MINIBATCHES: lambda c: c.trainer in GROUPED and c.train.minibatches > 1,
    names.REFERENCE: lambda c: c.trainer in GROUPED and c.grpo.kl_beta > 0,
    names.SLOW_STEPS: lambda c: False,
    names.SLOW_EVALUATIONS: lambda c: False,
    names.CACHED: lambda c: c.trainer == "offline_distillation",
    names.FUNCTIONS: lambda c: bool(getattr(c.reward, "functions", {})),
    names.FILTERING: lambda c: c.trainer == "onpolicy_sft",
    names.ADASR: lambda c: c.trainer == "hrpo",
    names.PROACTIVE: lambda c: c.trainer == "proactivellm",
    names.EVERY_EVALUATION: lambda c: True,
    names.STREAMING_EVALUATION: lambda c: c.trainer in ("hrpo", "streaming_sft"),
    names.SIMULTANEOUS_EVALUATION: lambda c: c.trainer == "proactivellm",
}


def written(run: str) -> set[str]:
    """The table's names of what a golden run wrote."""
    rows = json.loads((GOLDEN / f"{run}.json").read_text())["rows"]
    return {entry(name) for row in rows for name in row}


@pytest.mark.parametrize("run", RUNS)
def test_a_golden_run_wrote_the_names_that_the_table_gives_it(run):
    keys = {"recipe": run} | RUNS[run]
    keys.pop("stop_at", None)
    config = compose([f"{key}={value}" for key, value in keys.items()])
    promised = {name for name, metric in METRICS.items() if WRITERS[metric.rows](config)}
    assert written(run) == promised - NOT_RECORDED


def test_every_name_is_in_a_golden_file_or_is_a_time():
    reached = set().union(*map(written, RUNS))
    assert set(METRICS) - reached == NOT_RECORDED


def test_a_metric_has_a_unit_and_one_sentence():
    for name, metric in METRICS.items():
        assert metric.unit and metric.rows in WRITERS, name
        assert metric.meaning.endswith(".") and len(metric.meaning.split()) <= 25, name


def test_the_name_of_an_evaluation_is_found_whatever_the_data_is_called():
    assert entry("eval/stories/avg@4") == "eval/<data>/avg@k"
    assert entry("eval/a@b/latency_s") == "eval/<data>/latency_s"
    assert entry("teacher/math/kl") == "teacher/<name>/kl" and entry("teacher/kl") == "teacher/kl"
    assert entry("train/loss") == "train/loss"
