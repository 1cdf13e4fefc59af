"""HRPO: which token has which advantage, GRPO as its special case, the importance weight, and whole
runs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recipes.compose import compose
from recipes.errors import ConfigError, ModelError
from rewards.groups import group_advantages
from rewards.streaming import score_stages
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Trajectory
from trainers.hrpo import HRPO
from trainers.losses import Loss
from trainers.modes import reading_mode
from trainers.prepare import prepare
from trainers.run import Run

LIMIT, CAP, GROUP = 30, 12, 4


@pytest.fixture(scope="module")
def tokenizer(streaming_model):
    return AutoTokenizer.from_pretrained(streaming_model)


@pytest.fixture(scope="module")
def trainer(tokenizer):
    def make(*overrides):
        config = compose(
            [
                "recipe=adasr",
                f"rollout.samples_per_prompt={GROUP}",
                f"streaming.max_thought_tokens={CAP}",
                *overrides,
            ]
        )
        return HRPO(
            Run(
                config=config,
                mode=reading_mode(config),
                device=torch.device("cpu"),
                tokenizer=tokenizer,
                stop_ids=(tokenizer.eos_token_id,),
                vocab=len(tokenizer),
                prompts=[],
                sampler=None,
            )
        )

    return make


def sampled(tokenizer, seed, prompts=3, sentences=2):
    """Completions of every quality: right or wrong, skipped or thought, well and badly closed."""
    rng, protocol, made = np.random.default_rng(seed), Protocol.of(tokenizer), []
    box = tokenizer("\\boxed{7}").input_ids
    for prompt in range(prompts):
        for sample in range(GROUP):
            parts, forced = [[protocol.sep, protocol.eoq]], []
            for _ in range(sentences):
                words = rng.integers(20, 90, rng.integers(1, CAP - 1)).tolist()
                parts.append([protocol.skip] if rng.random() < 0.4 else [*words, protocol.eot])
                forced.append(len(parts[-1]) > 1 and rng.random() < 0.2)
            parts.append(
                [
                    *rng.integers(20, 90, rng.integers(1, 9)).tolist(),
                    protocol.eor,
                    *box,
                    protocol.eoa,
                ]
            )
            slots = np.repeat(np.arange(-1, len(parts) - 1), [len(p) for p in parts])
            chosen = slots >= 0
            for slot in np.flatnonzero(forced):
                chosen[np.flatnonzero(slots == slot)[-1]] = False
            ids = [token for part in parts for token in part]
            made.append(
                Trajectory(
                    prompt,
                    sample,
                    [5, 6],
                    ids,
                    "stop" if rng.random() < 0.8 else "length",
                    logprobs=-rng.random(len(ids)).astype(np.float32),
                    score=float(rng.random() < 0.6),
                    sampled=chosen,
                    slots=slots,
                )
            )
    return made


def by_hand(drawn, options, tokenizer):
    """[P * n] global, streaming and deep advantages, and the stages."""
    stages = [
        score_stages(
            t, Protocol.of(tokenizer), tokenizer.decode, (tokenizer.eos_token_id,), CAP, LIMIT
        )
        for t in drawn
    ]
    columns = np.array([s.rewards(options) for s in stages]).T.reshape(3, -1, GROUP)
    return [group_advantages(column).ravel() for column in columns], stages


@pytest.mark.parametrize("granularity", ["stage", "sentence", "boundary_token"])
def test_no_stage_of_a_truncated_completion_has_a_reward(trainer, tokenizer, granularity):
    """Its advantages are those of a completion that was worth nothing at all."""
    keys = f"hrpo.granularity={granularity}", "grpo.truncated=zero_reward"
    made, drawn = trainer(*keys), sampled(tokenizer, 1)
    made.advantages(drawn, LIMIT)
    cut = [t.finish_reason == "length" for t in drawn]
    assert any(cut) and not all(cut)
    assert all(t.reward == 0 for t, is_cut in zip(drawn, cut) if is_cut)
    assert any(t.reward for t in drawn)
    slots = [made.sentence_rewards(index) for index in range(len(drawn))]
    assert not any(array.any() for array, is_cut in zip(slots, cut) if is_cut)


@pytest.mark.parametrize("granularity", ["stage", "sentence", "boundary_token"])
def test_local_weight_0_is_grpo_on_the_global_reward_to_the_bit(trainer, tokenizer, granularity):
    made, drawn = (
        trainer("hrpo.local_weight=0", f"hrpo.granularity={granularity}"),
        sampled(tokenizer, 0),
    )
    ours = made.advantages(drawn, LIMIT)
    (whole, _, _), stages = by_hand(drawn, made.config.hrpo, tokenizer)
    assert np.ptp(whole) > 0
    for t, s, a, expected in zip(drawn, stages, ours, whole):
        assert t.reward == s.accuracy + made.config.hrpo.format_weight * s.format
        assert (
            np.array_equal(a, np.full(len(t.completion_ids), expected, np.float32))
            and a.dtype == np.float32
        )
    baseline = compose(["recipe=adasr_grpo"])
    assert baseline.hrpo.local_weight == 0 and baseline.trainer == "hrpo"


def test_local_weight_0_has_grpos_gradient(trainer, tokenizer):
    """The loss of HRPO at 0 against the formula of GRPO written out, on packed tokens with their
    masks."""
    made, drawn = trainer("hrpo.local_weight=0"), sampled(tokenizer, 1)
    advantages, mask = (
        np.concatenate(made.advantages(drawn, LIMIT)),
        np.concatenate([t.sampled for t in drawn]),
    )
    torch.manual_seed(0)
    count, width = len(mask), 6
    hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    head = SimpleNamespace(
        weight=torch.randn(len(tokenizer), width, dtype=torch.float64), bias=None, softcap=None
    )
    targets = torch.tensor([token for t in drawn for token in t.completion_ids])
    batch = SimpleNamespace(
        targets=targets,
        mask=torch.from_numpy(mask),
        annotations={"mask": torch.from_numpy(mask), "advantages": torch.from_numpy(advantages)},
    )
    (ours,) = torch.autograd.grad(made.loss()(head, hidden, batch, 5.0)["loss"], hidden)
    logprobs = (hidden @ head.weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (whole, _, _), _ = by_hand(drawn, made.config.hrpo, tokenizer)
    given = torch.from_numpy(
        np.repeat(whole, [len(t.completion_ids) for t in drawn]).astype(np.float32)
    )
    ratio = (logprobs - logprobs.detach()).exp()
    (expected,) = torch.autograd.grad(-(torch.from_numpy(mask) * ratio * given).sum() / 5, hidden)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-6)
    assert (ours[~torch.from_numpy(mask)] == 0).all()


def test_each_stage_has_its_own_advantage(trainer, tokenizer):
    made, drawn = trainer("hrpo.local_weight=0.3"), sampled(tokenizer, 2)
    (whole, streaming, deep), _ = by_hand(drawn, made.config.hrpo, tokenizer)
    for i, (t, a) in enumerate(zip(drawn, made.advantages(drawn, LIMIT))):
        np.testing.assert_allclose(
            a[(t.slots >= 0) & (t.slots < 2)], 0.3 * streaming[i] + 0.7 * whole[i], rtol=1e-6
        )
        np.testing.assert_allclose(a[t.slots == 2], 0.3 * deep[i] + 0.7 * whole[i], rtol=1e-6)
    assert not np.allclose(streaming, deep) and not np.allclose(streaming, whole)


def test_by_sentence(trainer, tokenizer):
    made, drawn = trainer("hrpo.local_weight=1", "hrpo.granularity=sentence"), sampled(tokenizer, 3)
    (_, _, deep), stages = by_hand(drawn, made.config.hrpo, tokenizer)
    ours = made.advantages(drawn, LIMIT)
    for start in range(0, len(drawn), GROUP):
        for slot in range(2):
            rewards = [
                0.2 * s.closed[slot]
                + s.accuracy * (0.1 * (1 - s.lengths[slot] / CAP) + (1 - s.deep_length / LIMIT))
                for s in stages[start : start + GROUP]
            ]
            expected = group_advantages(np.array([rewards]))[0]
            for t, a, value in zip(drawn[start:], ours[start:], expected):
                np.testing.assert_allclose(a[t.slots == slot], value, rtol=1e-5, atol=1e-7)
    assert all(np.allclose(a[t.slots == 2], value) for t, a, value in zip(drawn, ours, deep))


def test_by_boundary_token(trainer, tokenizer):
    made, drawn = (
        trainer("hrpo.local_weight=1", "hrpo.granularity=boundary_token"),
        sampled(tokenizer, 4),
    )
    (whole, streaming, deep), _ = by_hand(drawn, made.config.hrpo, tokenizer)
    protocol = Protocol.of(tokenizer)
    for i, (t, a) in enumerate(zip(drawn, made.advantages(drawn, LIMIT))):
        for token, slot, value in zip(t.completion_ids, t.slots, a):
            local = {
                protocol.eot: streaming,
                protocol.skip: streaming,
                protocol.eor: deep,
                protocol.eoa: deep,
            }
            expected = local[token][i] if slot >= 0 and token in local else whole[i]
            assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("granularity", ["stage", "sentence", "boundary_token"])
def test_swapping_two_rollouts_swaps_their_advantages_and_nothing_else(
    trainer, tokenizer, granularity
):
    made = trainer(f"hrpo.granularity={granularity}")
    before = made.advantages(sampled(tokenizer, 5), LIMIT)
    drawn = sampled(tokenizer, 5)
    drawn[GROUP + 1], drawn[GROUP + 3] = drawn[GROUP + 3], drawn[GROUP + 1]
    after = made.advantages(drawn, LIMIT)
    after[GROUP + 1], after[GROUP + 3] = after[GROUP + 3], after[GROUP + 1]
    for i, (a, b) in enumerate(zip(before, after)):
        # sums in another order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=str(i))
    others = [*range(GROUP), *range(2 * GROUP, len(drawn))]
    assert all(np.array_equal(before[i], after[i]) for i in others)


def test_metrics(trainer, tokenizer):
    made, drawn = trainer(), sampled(tokenizer, 6)
    made.advantages(drawn, LIMIT)
    row = made.metrics(drawn)
    skip = Protocol.of(tokenizer).skip
    assert row["rollout/streaming_length_mean"] == np.mean(
        [((t.slots >= 0) & (t.slots < 2)).sum() for t in drawn]
    )
    assert row["rollout/deep_length_mean"] == np.mean([(t.slots == 2).sum() for t in drawn])
    assert row["rollout/skip_frac"] == pytest.approx(
        np.mean([t.completion_ids.count(skip) / 2 for t in drawn])
    )
    stages = by_hand(drawn, made.config.hrpo, tokenizer)[1]
    assert row["reward/format"] == pytest.approx(np.mean([s.format for s in stages]))
    assert 0 < row["reward/thinking"] < 2 and 0 <= row["reward/equal_groups_frac"] <= 1


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("old", [True, False])
def test_the_truncated_importance_weight(beta, old):
    torch.manual_seed(0)
    head = SimpleNamespace(weight=torch.randn(11, 4, dtype=torch.float64), bias=None, softcap=None)
    hidden, targets = (
        torch.randn(9, 4, dtype=torch.float64, requires_grad=True),
        torch.randint(11, (9,)),
    )
    logprobs = (hidden @ head.weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    mask = torch.arange(9) != 3
    notes = {
        "mask": mask,
        "advantages": torch.randn(9, dtype=torch.float64),
        "rollout_logprobs": logprobs.detach() + torch.randn(9),
        "reference_logprobs": logprobs.detach(),
    }
    before = logprobs.detach() + 0.1 if old else logprobs.detach()
    if old:
        notes["old_logprobs"] = before
    weight = (before - notes["rollout_logprobs"]).exp().clamp(max=1.5)
    assert 0 < (weight == 1.5).sum() < 9
    objective = {"objective": "ppo_clip", "clip_low": 0.2, "clip_high": 0.2}
    output = Loss(policy_gradient=True, kl_beta=beta, objective=objective | {"is_cap": 1.5})(
        head, hidden, SimpleNamespace(targets=targets, mask=mask, annotations=notes), 2.0
    )
    ratio = (logprobs - before).exp()
    gain = torch.minimum(ratio * notes["advantages"], ratio.clamp(0.8, 1.2) * notes["advantages"])
    expected = -(mask * weight * gain).sum() / 2  # the KL to itself is 0, and so is its gradient
    torch.testing.assert_close(output["loss"], expected, atol=1e-10, rtol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(output["loss"], hidden), torch.autograd.grad(expected, hidden)
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_the_samplers_logprobs_are_annotated_for_the_weight(trainer, tokenizer):
    for overrides, there in (((), False), (("grpo.importance_cap=2",), True)):
        made, drawn = trainer("train.minibatches=1", *overrides), sampled(tokenizer, 7)
        made.annotate(drawn)
        assert all(("rollout_logprobs" in t.annotations) == there for t in drawn)
        assert all((t.annotations["mask"] == t.sampled).all() for t in drawn)
        assert made.loss().objective["is_cap"] == (2 if there else None)
    assert all((t.annotations["rollout_logprobs"] == t.logprobs).all() for t in drawn)


@pytest.mark.parametrize(
    "kind, said, changed",
    [
        (
            ConfigError,
            "streaming.layout=null: recipe=adasr needs grouped, interleaved or batch",
            {"streaming__layout": "null", "rollout__engine": "hf"},
        ),
        (ConfigError, "hrpo.local_weight=1.5 must be between 0 and 1", {"hrpo__local_weight": 1.5}),
        (ConfigError, "hrpo.deep_weight=-1.0 must be 0 or more", {"hrpo__deep_weight": -1}),
        (
            ConfigError,
            "hrpo.granularity=sentences is not known; did you mean 'sentence'?",
            {"hrpo__granularity": "sentences"},
        ),
        (ConfigError, "grpo.importance_cap=0.0 must be above 0", {"grpo__importance_cap": 0}),
        (
            ConfigError,
            "recipe=adasr compares samples of one prompt",
            {"rollout__samples_per_prompt": 1},
        ),
        (
            ModelError,
            "has no token <SEP>, which streaming needs; run recipe=streaming_sft first",
            {},
        ),
    ],
)
def test_impossible_settings(overrides, kind, said, changed):
    with pytest.raises(kind) as caught:
        prepare(compose(overrides(recipe="adasr", **changed)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layout, sampler, ranks", [("grouped", "streaming", 2), ("interleaved", "hf", 1)]
)
def test_a_whole_run(overrides, streaming_model, run_command, tmp_path, layout, sampler, ranks):
    done = run_command(
        "train.py",
        *overrides(
            recipe="adasr",
            model__path=streaming_model,
            streaming__layout=layout,
            rollout__engine=sampler,
            rollout__samples_per_prompt=4,
            streaming__max_thought_tokens=6,
            train__lr=3e-3,
            grpo__importance_cap=2,
            eval__k=1,
        ),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 2 and any("eval/stories/avg@1" in row for row in rows)
    for row in steps:
        assert (
            0 < row["rollout/streaming_length_mean"] <= 6 * 5
            and 0 < row["rollout/deep_length_mean"] <= 12
        )
        assert (
            row["rollout/length_mean"]
            <= row["rollout/streaming_length_mean"] + row["rollout/deep_length_mean"]
        )
        assert row["mismatch/logp_abs_mean"] < 1e-3 and 0 <= row["reward/format"] <= 1
