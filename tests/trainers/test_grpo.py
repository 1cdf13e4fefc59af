"""GRPO: advantages and reward against written-out sums, the KL's gradient against autograd,
clipping, the reference."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rewards.groups import group_advantages
from rewards.length import length_reward
from rollouts.data.examples import Example, Prompt, PromptSampler
from rollouts.trajectory import Trajectory
from trainers.core.policy import load_policy
from trainers.core.teacher import Reference
from trainers.grpo import GRPO
from trainers.losses import Loss, k3
from trainers.modes import reading_mode
from trainers.prepare import prepare
from trainers.run import Run

ROOT = Path(__file__).resolve().parents[2]
T, H, V = 19, 6, 23


def test_advantages_against_the_sums_written_out():
    rewards = np.array([[1.0, 0.0, 0.5, 0.0], [0.2, 0.4, 0.9, 0.1]])
    for row, ours, centred in zip(
        rewards, group_advantages(rewards), group_advantages(rewards, normalize_std=False)
    ):
        mean = sum(row) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / 4)
        assert ours.tolist() == pytest.approx([(r - mean) / (std + 1e-6) for r in row], abs=1e-12)
        assert centred.tolist() == pytest.approx([r - mean for r in row], abs=1e-12)


@pytest.mark.parametrize("rewards", [[[0.7]], [[0.1, 0.1, 0.1]], [[0.0, 0.0]], [[1.3] * 7]])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_one_or_of_equal_rewards_has_advantage_zero(rewards, normalize_std):
    assert (group_advantages(np.array(rewards), normalize_std) == 0).all()


@pytest.mark.parametrize(
    "score, tokens, gamma, expected",
    [
        (1.0, 20, 0.5, 1 + 0.5 * 0.75),
        (1.0, 80, 0.5, 1.0),
        (0.0, 1, 0.5, 0.0),
        (1.0, 20, 0.0, 1.0),
        (1.0, 40, 2.0, 2.0),
    ],
)
def test_the_length_reward_is_for_correct_answers(score, tokens, gamma, expected):
    trajectory = Trajectory(0, 0, [1], [1] * tokens, "stop", score=score)
    assert length_reward(trajectory, 80, gamma) == pytest.approx(expected)


def test_draw_writes_rewards_and_advantages_by_prompt():
    lengths = {(p, s): 3 + (5 * p + 2 * s) % 7 for p in range(4) for s in range(3)}

    def generate(requests, sampling):
        return [
            Trajectory(
                r.prompt_index,
                r.sample_index,
                [5],
                [9] * lengths[r.prompt_index, r.sample_index],
                "stop",
            )
            for r in requests
        ]

    config = compose(
        [
            "recipe=grpo",
            "rollout.samples_per_prompt=3",
            "train.prompts_per_step=4",
            "train.minibatches=1",
            "grpo.kl_beta=0",
            "grpo.gamma=0.25",
            "rollout.max_new_tokens_schedule=[[1,20]]",
        ]
    )
    prompts = [Prompt(i, (3,), "", Example(i, [], answer="a")) for i in range(4)]
    made = GRPO(
        Run(
            config=config,
            mode=reading_mode(config),
            device=torch.device("cpu"),
            tokenizer=SimpleNamespace(decode=lambda ids: "x" * len(ids)),
            stop_ids=(1,),
            vocab=V,
            prompts=prompts,
            sampler=PromptSampler(4, 4, 0),
            verifier=lambda text, answer: float(len(text) > 3),
            rollout=SimpleNamespace(generate=generate),
        )
    )
    drawn = made.draw(0)
    for start in range(0, 12, 3):
        group = drawn[start : start + 3]
        assert len({t.prompt_index for t in group}) == 1
        sizes = [len(t.completion_ids) for t in group]
        # the stop token is no text
        rewards = [(n - 1 > 3) * (1 + 0.25 * (1 - n / 20)) for n in sizes]
        assert [t.reward for t in group] == pytest.approx(rewards)
        for t, r in zip(group, rewards):
            expected = (
                0 if np.ptp(rewards) == 0 else (r - np.mean(rewards)) / (np.std(rewards) + 1e-6)
            )
            assert t.annotations["advantages"] == pytest.approx(
                np.full(len(t.completion_ids), expected), rel=1e-6
            )
    assert 0 <= made.metrics(drawn)["reward/equal_groups_frac"] <= 1


@pytest.mark.parametrize("truncated", ["as_is", "zero_reward", "mask"])
def test_completions_cut_at_the_limit(truncated):
    config = compose(["recipe=grpo", f"grpo.truncated={truncated}", "grpo.kl_beta=0"])
    count = config.rollout.samples_per_prompt
    made = GRPO(Run(config=config, mode=reading_mode(config), vocab=V))
    drawn = [
        Trajectory(0, sample, [5], [9] * 10, "length" if sample == 0 else "stop", score=1.0)
        for sample in range(count)
    ]
    advantages = [array[0] for array in made.advantages(drawn, 20)]
    rewards = {trajectory.reward for trajectory in drawn[1:]}
    assert len(rewards) == 1 and min(rewards) > 1
    if truncated == "zero_reward":
        assert drawn[0].reward == 0 and advantages[0] < 0 < advantages[1]
    else:
        assert drawn[0].reward in rewards and not any(advantages)
    kept = [made.keeps(trajectory) for trajectory in drawn]
    assert kept == [truncated != "mask"] + [True] * (count - 1)
    frac = made.metrics(drawn).get("rollout/kept_frac")
    assert frac == (1 - 1 / count if truncated == "mask" else None)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    head = SimpleNamespace(weight=make(V, H).requires_grad_(), bias=None, softcap=None)
    hidden, targets = make(T, H).requires_grad_(), torch.randint(V, (T,))
    logprobs = (hidden @ head.weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    notes = {
        "advantages": make(T),
        "old_logprobs": logprobs.detach() + 0.4 * make(T),
        "reference_logprobs": logprobs.detach() + make(T),
        "weights": torch.rand(T, dtype=torch.float64),
    }
    mask = torch.rand(T) > 0.3
    return SimpleNamespace(
        head=head,
        hidden=hidden,
        logprobs=logprobs,
        mask=mask,
        notes=notes,
        batch=SimpleNamespace(targets=targets, mask=mask, annotations=notes),
    )


def gradients(toy, loss):
    return torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(loss, (toy.hidden, toy.head.weight), retain_graph=True)
        ]
    )


PPO = {"objective": "ppo_clip", "clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("without", [(), ("weights",), ("old_logprobs",)])
def test_the_loss_is_the_clipped_objective_plus_the_kl(toy, beta, without):
    for name in without:
        toy.notes.pop(name)
    advantages, weights = toy.notes["advantages"], toy.notes.get("weights", torch.ones(T))
    ratio = (toy.logprobs - toy.notes.get("old_logprobs", toy.logprobs.detach())).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    gap = toy.notes["reference_logprobs"] - toy.logprobs
    kl = gap.exp() - gap - 1
    expected = (toy.mask * weights * (beta * kl - clipped)).sum() / 7
    output = Loss(policy_gradient=True, objective=PPO, kl_beta=beta)(
        toy.head, toy.hidden, toy.batch, 7.0
    )
    torch.testing.assert_close(output["loss"], expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        gradients(toy, output["loss"]), gradients(toy, expected), atol=1e-10, rtol=1e-8
    )
    if beta:
        torch.testing.assert_close(
            output["kl"][toy.mask], kl.detach()[toy.mask], atol=1e-10, rtol=1e-8
        )
    if "old_logprobs" in toy.notes:
        flat = (ratio * advantages > clipped + 1e-12)[toy.mask]
        assert (
            0 < flat.sum() < len(flat)
            and output["clipped"][toy.mask].bool().tolist() == flat.tolist()
        )


def test_the_gradient_of_the_kl_is_one_minus_the_ratio(toy):
    values = k3(toy.logprobs, toy.notes["reference_logprobs"])
    assert (values >= 0).all()
    (ours,) = torch.autograd.grad(values.sum(), toy.logprobs, retain_graph=True)
    torch.testing.assert_close(
        ours, 1 - (toy.notes["reference_logprobs"] - toy.logprobs.detach()).exp()
    )
    assert torch.isfinite(k3(torch.tensor([-800.0]), torch.tensor([0.0]))).all()


def test_cross_entropy_cannot_be_clipped():
    with pytest.raises(ValueError, match="not to be mixed"):
        Loss(cross_entropy=True, objective=PPO)


def test_the_reference_scores_the_sampled_tokens_with_the_starting_weights(tiny_models):
    device, rng = torch.device("cpu"), np.random.default_rng(0)
    config = compose(
        [
            "recipe=grpo",
            f"model.path={tiny_models['student']}",
            "train.tokens_per_microbatch=30",
            "rollout.temperature=0.8",
        ]
    )
    made = [
        Trajectory(i, 0, rng.integers(3, 400, 4).tolist(), rng.integers(3, 400, n).tolist(), "stop")
        for i, n in enumerate((3, 17, 8))
    ]
    # the head's other rows are padding
    run = Run(config=config, mode=reading_mode(config), device=device, vocab=450)
    Reference(run).annotate(made)
    model = load_policy(str(tiny_models["student"]), torch.float32, device).model.eval()
    for t in made:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([t.token_ids])).logits[0, 3:-1, :450] / 0.8
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(t.completion_ids)[:, None])[:, 0]
        np.testing.assert_allclose(t.annotations["reference_logprobs"], expected, atol=1e-5)


def refused(kind, overrides) -> str:
    with pytest.raises(kind) as caught:
        prepare(compose(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "key, value, said",
    [
        (
            "rollout__samples_per_prompt",
            1,
            "rollout.samples_per_prompt=1: recipe=grpo compares samples of one prompt",
        ),
        ("grpo__gamma", -1, "grpo.gamma=-1.0 must be 0 or more"),
        ("grpo__kl_beta", -1, "grpo.kl_beta=-1.0 must be 0 or more"),
        ("grpo__clip_low", 1.5, "grpo.clip_low=1.5 must be between 0 and 1"),
    ],
)
def test_impossible_settings(overrides, key, value, said):
    assert said in refused(ConfigError, overrides(recipe="grpo", **{key: value}))


def test_data_without_answers(overrides, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"question": "a"}\n')
    message = refused(DataError, overrides(recipe="grpo", data__path=tmp_path / "bare.jsonl"))
    assert "no row has an answer, and recipe=grpo" in message


def test_a_whole_run_on_two_ranks(overrides, run_command, tmp_path, monkeypatch):
    (tmp_path / "my_verifier.py").write_text(
        "def even(text, answer):\n    return float(len(text) % 2 == 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    done = run_command(
        "train.py",
        *overrides(
            recipe="grpo",
            reward__verifier="my_verifier.even",
            rollout__engine="hf",
            rollout__samples_per_prompt=4,
            train__minibatches=4,
            train__lr=3e-3,
            grpo__clip_low=0.01,
            grpo__clip_high=0.01,
            eval__every=-1,
        ),
        ranks=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2
    for row in rows:
        assert row["reward/mean"] > 0 and row["train/grad_norm"] > 0 and row["policy/clip_frac"] > 0
    assert rows[1]["reference/kl"] > rows[0]["reference/kl"] > 0
