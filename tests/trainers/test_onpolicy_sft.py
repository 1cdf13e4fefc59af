"""On-policy SFT: what is kept, whose gradient that is, whatever the split; nothing to keep; each
refusal's line."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rollouts.data.examples import Example, Prompt, PromptSampler
from rollouts.trajectory import Trajectory
from trainers.base import max_new_tokens
from trainers.core.batching import pack, shard_by_tokens
from trainers.core.updates import normalize
from trainers.modes import reading_mode
from trainers.onpolicy_sft import OnPolicySFT
from trainers.prepare import prepare
from trainers.run import Run

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "selection_worker.py"
V, H, N = 11, 5, 3
STOP, BOX = 1, 2


class Rollout:
    """Completions of three to seven tokens. Sample 0 is right and ends, 1 is right and cut, 2 is
    wrong and ends; in every third prompt sample 2 is right too."""

    def __init__(self):
        self.calls = 0

    def generate(self, requests, sampling):
        self.calls += 1
        made = []
        for r in requests:
            rng = np.random.default_rng(r.seed)
            ids = rng.integers(3, V, int(rng.integers(2, 7))).tolist()
            if r.sample_index < 2 or r.prompt_index % 3 == 0:
                ids[-1] = BOX
            cut = r.sample_index == 1
            made.append(
                Trajectory(
                    r.prompt_index,
                    r.sample_index,
                    list(r.prompt_ids),
                    ids + [STOP] * (not cut),
                    "length" if cut else "stop",
                )
            )
        return made


def trainer(*overrides, count: int = 6):
    config = compose(
        [
            "recipe=onpolicy_sft",
            f"rollout.samples_per_prompt={N}",
            "train.prompts_per_step=6",
            "train.minibatches=1",
            *overrides,
        ]
    )
    OnPolicySFT.check(config)
    prompts = [
        Prompt(i, (3 + i % 5, 4), f"prompt {i}", Example(i, [], answer=str(BOX)))
        for i in range(count)
    ]
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    parts = Run(
        config=config,
        mode=reading_mode(config),
        device=torch.device("cpu"),
        tokenizer=tokenizer,
        stop_ids=(STOP,),
        vocab=V,
        prompts=prompts,
        sampler=PromptSampler(count, 6, 0),
        verifier=lambda text, answer: float(answer in text.split()),
        rollout=Rollout(),
    )
    return OnPolicySFT(parts)


def test_a_sample_counts_if_it_is_correct_and_ended_by_itself():
    made = trainer()
    drawn = made.draw(0)
    for t in drawn:
        assert t.score == float(t.sample_index < 2 or t.prompt_index % 3 == 0)
        assert made.keeps(t) == (
            t.sample_index == 0 or (t.sample_index == 2 and t.prompt_index % 3 == 0)
        )
    cut = [t for t in drawn if t.finish_reason == "length"]
    assert len(cut) == 6 and all(t.score == 1 and not made.keeps(t) for t in cut)
    assert made.metrics(drawn) == {
        "rollout/kept_frac": pytest.approx(8 / 18),
        "rollout/prompts_with_none": 0,
    }
    for t in drawn[:N]:
        t.reward = 0.0
    assert made.metrics(drawn)["rollout/prompts_with_none"] == 1


def token_logprobs(embedding, weight, trajectory):
    """A bigram model: [T] log-probs of a completion."""
    ids = torch.tensor(trajectory.token_ids)
    start = len(trajectory.prompt_ids)
    logprobs = (embedding[ids[start - 1 : -1]] @ weight.T).log_softmax(-1)
    return logprobs.gather(-1, ids[start:, None])[:, 0]


@pytest.mark.parametrize("normalizer", ["max_length", "token_mean", "sequence_mean"])
def test_the_gradient_is_the_policy_gradient_of_a_reward_of_one_for_a_kept_sample(normalizer):
    torch.manual_seed(0)
    embedding = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    made = trainer(f"train.normalizer={normalizer}")
    drawn = made.draw(0)

    good = lambda t: STOP in t.completion_ids and BOX in t.completion_ids  # noqa: E731
    lengths = [len(t.completion_ids) for t in drawn if good(t)]
    total = 0.0
    for t in drawn:  # all samples, kept or not
        size = {
            "max_length": len(lengths) * max(lengths),
            "token_mean": sum(lengths),
            "sequence_mean": len(lengths) * len(t.completion_ids),
        }[normalizer]
        total = total - float(good(t)) * token_logprobs(embedding, weight, t).sum() / size
    expected = torch.autograd.grad(total, (embedding, weight))

    mine = shard_by_tokens([t for t in drawn if made.keeps(t)], 0, 1)
    made.annotate(mine)
    groups = [range(0, 3), range(3, len(mine))]
    denominator, _, _ = normalize(mine, normalizer, groups)
    head, loss = SimpleNamespace(weight=weight, bias=None, softcap=None), 0.0
    for members in groups:
        batch = pack(mine, list(members), torch.device("cpu"))
        loss = (
            loss
            + made.loss()(head, embedding[batch.input_ids[0, batch.rows]], batch, denominator)[
                "loss"
            ]
        )
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, (embedding, weight)), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


FEW, ALL = "3", "-".join(map(str, range(8)))  # with one kept sample, one of two ranks has none
SPLIT = [
    f"zero1/{normalizer}/1/{kept}"
    for normalizer in ("max_length", "token_mean", "sequence_mean")
    for kept in (FEW, ALL)
] + [f"zero3/max_length/1/{FEW}", f"zero1/max_length/2/{FEW}"]
NONE = "zero1/max_length/2/"


@pytest.fixture(scope="module")
def steps(tiny_models, run_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("steps")
    os.environ["PYTHONPATH"] = str(ROOT)
    for ranks in (0, 2):
        done = run_command(
            WORKER, tiny_models["student"], out, *SPLIT, NONE, ranks=ranks, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def read(setting, ranks):
        name = f"{setting.replace('/', '_')}_{ranks}"
        row = json.loads((out / f"{name}.json").read_text())
        return row, [dict(np.load(path)) for path in sorted(out.glob(f"{name}_*.npz"))]

    return read


@pytest.mark.parametrize("setting", SPLIT)
def test_two_ranks_one_of_them_without_a_kept_sample_make_the_gradient_of_one(steps, setting):
    (one, reference), (two, ours) = steps(setting, 1), steps(setting, 2)
    assert len(reference) == len(ours) == 1
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
    assert (
        two["rollout/kept_frac"]
        == one["rollout/kept_frac"]
        == (1 if setting.endswith(ALL) else 1 / 8)
    )
    for name, expected in reference[0].items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(
            ours[0][name], expected, atol=2e-6 * scale + 1e-9, rtol=2e-5, err_msg=name
        )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_part_without_a_kept_sample_is_skipped_and_counted(steps, ranks):
    row, updates = steps(f"zero1/max_length/2/{FEW}", ranks)
    assert row["train/skipped"] == 1 and len(updates) == 1 and row["changed"] > 0
    assert row["said"] == ["step 1: 1 of 2 updates skipped, no sample of theirs was kept"]
    row, updates = steps(NONE, ranks)
    assert row["train/skipped"] == 2 and not updates and row["changed"] == 0
    assert np.isnan(row["train/loss"]) and row["rollout/prompts_with_none"] == 4


def test_a_rank_without_a_trajectory_gets_padding_and_nothing_is_dropped():
    made = [Trajectory(i, 0, [1], [2] * n, "stop") for i, n in enumerate((5, 2, 4))]
    shares = [shard_by_tokens(made, rank, 5) for rank in range(5)]
    assert sorted(t.prompt_index for part in shares for t in part if not t.padding) == [0, 1, 2]
    assert [[t.padding for t in part] for part in shares] == [
        [False],
        [False],
        [False],
        [True],
        [True],
    ]
    assert len(shares[4][0].completion_ids) == 2 and not made[1].padding
    assert shard_by_tokens([], 0, 2) == []


def test_the_fixed_set_is_drawn_once_from_the_starting_model():
    made = trainer("rollout.fixed_steps=2", count=30)
    assert made.run.rollout.calls == 2
    first = [[t.prompt_index for t in made.draw(step)] for step in range(4)]
    assert made.run.rollout.calls == 2 and first[0] == first[2] != first[1] == first[3]
    fresh = trainer(count=30)
    assert [t.completion_ids for t in fresh.draw(1)] == [t.completion_ids for t in made.draw(1)]


def test_the_limit_follows_its_schedule():
    rollout = compose(
        ["rollout.max_new_tokens=90", "rollout.max_new_tokens_schedule=[[3,60],[5,40]]"]
    ).rollout
    assert [max_new_tokens(rollout, step) for step in range(6)] == [90, 90, 60, 60, 40, 40]


def refused(kind, overrides) -> str:
    with pytest.raises(kind) as caught:
        prepare(compose(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("rollout__samples_per_prompt", 0, "rollout.samples_per_prompt=0 must be 1 or more"),
        (
            "rollout__max_new_tokens",
            4000,
            "rollout.max_new_tokens or eval.max_new_tokens=4000 after prompts",
        ),
        (
            "rollout__max_new_tokens_schedule",
            "[[2,3000]]",
            "eval.max_new_tokens=3000 after prompts",
        ),
        ("rollout__max_new_tokens_schedule", "[[5,60],[2,40]]", "in the order of their steps"),
        (
            "rollout__temperature",
            0.7,
            "rollout.temperature=0.7: recipe=onpolicy_sft needs samples of the policy itself",
        ),
        ("rollout__top_p", 0.9, "allow_biased_sampling=true"),
        (
            "train__minibatches",
            3,
            "train.prompts_per_step=8 must be a multiple of train.minibatches=3",
        ),
        ("train__normalizer", "max_len", "did you mean 'max_length'?"),
    ],
)
def test_impossible_settings(overrides, key, value, said):
    assert said in refused(ConfigError, overrides(recipe="onpolicy_sft", **{key: value}))


def test_another_temperature_can_be_insisted_on(overrides):
    prepare(
        compose(
            overrides(recipe="onpolicy_sft", rollout__temperature=0.7, allow_biased_sampling="true")
        )
    )


def test_data_without_answers(overrides, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text('{"question": "a"}\n')
    assert refused(DataError, overrides(recipe="onpolicy_sft", data__path=path)) == (
        f"data.path={path}: no row has an answer, and recipe=onpolicy_sft learns from correct "
        "answers only; "
        "name its column with data.answer_column"
    )
    path.write_text('{"question": "a"}\n{"question": "b", "answer": "1"}\n')
    prepared = prepare(compose(overrides(recipe="onpolicy_sft", data__path=path)))
    assert len(prepared.prompts) == 1 and "1 of 2 rows have no answer and were dropped" in " ".join(
        prepared.messages
    )


def test_a_whole_run_with_a_verifier_of_ones_own(overrides, run_command, tmp_path, monkeypatch):
    (tmp_path / "my_verifier.py").write_text(
        "def even(text, answer):\n    return float(len(text) % 2 == 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    stops = "[" + ",".join(map(str, range(3, 40))) + "]"  # a random model would hardly ever stop
    done = run_command(
        "train.py",
        *overrides(
            recipe="onpolicy_sft",
            reward__verifier="my_verifier.even",
            rollout__stop_ids=stops,
            rollout__engine="hf",
            train__minibatches=2,
        ),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows[1:3]:
        assert (
            0 < row["rollout/kept_frac"] < row["reward/accuracy"] < 1 and row["train/grad_norm"] > 0
        )
        assert row["reward/mean"] == row["rollout/kept_frac"] and row["train/skipped"] == 0
        # the second update's weights are not those that sampled
        assert row["mismatch/logp_abs_mean"] < 1e-5
        assert row["rollout/efficiency"] == pytest.approx(
            100 * row["reward/accuracy"] / row["rollout/length_mean"]
        )
    assert rows[0]["eval/stories/efficiency"] == pytest.approx(
        100 * rows[0]["eval/stories/avg@2"] / rows[0]["eval/stories/length_mean"]
    )
    samples = [
        json.loads(line)
        for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    ]
    assert {s["reward"] for s in samples} == {0.0, 1.0}  # what was rejected is shown too
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Kept samples" in report and "Accuracy and length" in report
