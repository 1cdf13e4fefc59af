"""Bad input: one clear line that names the argument, and the right type of error. And the backend
switch."""

import math

import pytest
import torch

import kernels
from kernels import (
    distillation_divergence,
    fused_linear_distillation_divergence,
    fused_linear_logprobs,
    fused_linear_opd_loss,
    fused_linear_self_distillation_kl,
    fused_linear_topk_logprobs,
    log_ratio_reward,
    policy_gradient_loss,
    power_reward,
    selective_logprobs,
    topk_distillation_divergence,
)

T, V, H, K = 4, 9, 3, 2
X, W, Z = torch.randn(T, H), torch.randn(V, H), torch.randn(T, V)
IDS, LP, MASK = torch.arange(T), -torch.rand(T), torch.ones(T, dtype=torch.bool)
TOP, TOP_LP = torch.zeros(T, K, dtype=torch.int64), -torch.ones(T, K)


def opd(**change):
    given = {
        "hidden": X,
        "lm_head_weight": W,
        "token_ids": IDS,
        "teacher_logprobs": LP,
        "denominator": 1.0,
    }
    return fused_linear_opd_loss(**{**given, **change})


def score(**change):
    return fused_linear_logprobs(**{"hidden": X, "lm_head_weight": W, "token_ids": IDS, **change})


def select(**change):
    return selective_logprobs(**{"logits": Z, "token_ids": IDS, **change})


def topk(**change):
    return fused_linear_topk_logprobs(**{"hidden": X, "lm_head_weight": W, "k": 2, **change})


def loss(**change):
    return policy_gradient_loss(**{"logprobs": LP, "advantages": LP, "denominator": 1.0, **change})


def divergence(**change):
    return distillation_divergence(
        **{"student_logits": Z, "teacher_logits": Z, "denominator": 1.0, **change}
    )


def linear(**change):
    given = {
        "student_hidden": X,
        "student_weight": W,
        "teacher_hidden": X,
        "teacher_weight": W,
        "denominator": 1.0,
    }
    return fused_linear_distillation_divergence(**{**given, **change})


def support(**change):
    given = {
        "student_hidden": X,
        "student_weight": W,
        "support_ids": TOP,
        "teacher_logprobs": TOP_LP,
        "denominator": 1.0,
    }
    return topk_distillation_divergence(**{**given, **change})


def views(**change):
    given = {"student_hidden": X, "teacher_hidden": X, "lm_head_weight": W, "denominator": 1.0}
    return fused_linear_self_distillation_kl(**{**given, **change})


def power(**change):
    return power_reward(**{"teacher_logprobs": LP, "student_logprobs": LP, "alpha": 1.0, **change})


def ratio(**change):
    return log_ratio_reward(**{"teacher_logprobs": LP, "student_logprobs": LP, **change})


BAD = [
    (score, {"hidden": [1.0]}, TypeError, "hidden must be a float tensor [T, H], got list"),
    (
        score,
        {"hidden": X.long()},
        TypeError,
        "hidden must be a float tensor [T, H], got dtype torch.int64",
    ),
    (score, {"hidden": X[0]}, ValueError, "hidden must be a float tensor [T, H], got shape [3]"),
    (
        score,
        {"lm_head_weight": W[:, 1:]},
        ValueError,
        "lm_head_weight must be a float tensor [V, H] with H=3 as in hidden, got shape [9, 2]",
    ),
    (
        score,
        {"bias": W[:, 0][1:]},
        ValueError,
        "bias must be a float tensor [V] with V=9 as in lm_head_weight",
    ),
    (
        score,
        {"token_ids": IDS[1:]},
        ValueError,
        "token_ids must be an int64 tensor [T] with T=4 as in hidden",
    ),
    (
        score,
        {"token_ids": IDS.int()},
        TypeError,
        "token_ids must be an int64 tensor [T], got dtype torch.int32",
    ),
    (score, {"token_ids": IDS + 6}, IndexError, "token_ids must lie in [0, 9)"),
    (score, {"token_ids": IDS - 1}, IndexError, "token_ids must lie in [0, 9)"),
    (score, {"token_ids": IDS, "valid_vocab_size": 3}, IndexError, "token_ids must lie in [0, 3)"),
    (
        score,
        {"mask": LP},
        TypeError,
        "mask must be a bool or uint8 tensor [T], got dtype torch.float32",
    ),
    (score, {"mask": MASK[1:]}, ValueError, "mask must be a bool or uint8 tensor [T] with T=4"),
    (score, {"temperature": 0.0}, ValueError, "temperature must be finite, above 0, got 0.0"),
    (score, {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    (score, {"logit_softcap": -1.0}, ValueError, "logit_softcap must be finite, above 0, got -1.0"),
    (score, {"valid_vocab_size": 10}, ValueError, "valid_vocab_size must lie in [1, 9], got 10"),
    (score, {"valid_vocab_size": 2.0}, TypeError, "valid_vocab_size must be an int, got float"),
    (
        score,
        {"hidden": X.to("meta")},
        ValueError,
        "lm_head_weight must be on meta like the first tensor, got cpu",
    ),
    (select, {"logits": Z[0]}, ValueError, "logits must be a float tensor [T, V], got shape [9]"),
    (select, {"token_ids": IDS + 6}, IndexError, "token_ids must lie in [0, 9)"),
    (
        select,
        {"token_ids": IDS[None]},
        ValueError,
        "token_ids must be an int64 tensor [T, K] with T=4 as in logits",
    ),
    (topk, {"k": 0}, ValueError, "k must lie in [1, 9]"),
    (topk, {"k": 10}, ValueError, "k must lie in [1, 9]"),
    (topk, {"k": 2.0}, TypeError, "k must be an int, got float"),
    (power, {"alpha": -1.0}, ValueError, "alpha must be finite, at least 0, got -1.0"),
    (power, {"alpha": math.inf}, ValueError, "alpha must be finite, at least 0, got inf"),
    (power, {"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
    (
        power,
        {"alpha": 0, "normalization": "none"},
        ValueError,
        "alpha must be above 0 with normalization='none'",
    ),
    (
        power,
        {"normalization": "mean"},
        ValueError,
        "normalization must be one of box_cox, none, got 'mean'",
    ),
    (
        power,
        {"student_logprobs": LP[1:]},
        ValueError,
        "student_logprobs must be a float tensor [T] with T=4",
    ),
    (ratio, {"clip": 0.0}, ValueError, "clip must be finite, above 0, got 0.0"),
    (ratio, {"clip": 1.0, "tanh_scale": 1.0}, ValueError, "clip and tanh_scale exclude each other"),
    (
        loss,
        {"objective": "ppo"},
        ValueError,
        "objective must be one of reinforce, ppo_clip, cispo, got 'ppo'",
    ),
    (
        loss,
        {"denominator": 0},
        ValueError,
        "denominator must be above 0 (give an empty window 1), got 0.0",
    ),
    (loss, {"denominator": torch.tensor(0)}, ValueError, "denominator must be above 0"),
    (
        loss,
        {"denominator": torch.ones(1)},
        ValueError,
        "denominator must be a number or a 0-dim tensor, got shape [1]",
    ),
    (
        loss,
        {"denominator": "9"},
        TypeError,
        "denominator must be a number or a 0-dim tensor, got str",
    ),
    (
        loss,
        {"clip_low": 1.5},
        ValueError,
        "clip_low must be finite, at least 0 and at most 1, got 1.5",
    ),
    (loss, {"clip_high": -0.1}, ValueError, "clip_high must be finite, at least 0, got -0.1"),
    (
        loss,
        {"dual_clip": 1.0, "objective": "ppo_clip"},
        ValueError,
        "dual_clip must be finite, above 1, got 1.0",
    ),
    (
        loss,
        {"dual_clip": 2.0},
        ValueError,
        "dual_clip belongs to objective='ppo_clip', got objective='reinforce'",
    ),
    (loss, {"is_cap": 2.0}, ValueError, "rollout_logprobs and is_cap must be given together"),
    (
        loss,
        {"rollout_logprobs": LP},
        ValueError,
        "rollout_logprobs and is_cap must be given together",
    ),
    (loss, {"aggregation": "mean"}, ValueError, "aggregation must be one of token_mean"),
    (loss, {"aggregation": "seq_mean_token_mean"}, ValueError, "seq_ids must be given"),
    (
        loss,
        {"advantages": LP[1:]},
        ValueError,
        "advantages must be a float tensor [T] with T=4 as in logprobs",
    ),
    (
        opd,
        {"reward": "ratio"},
        ValueError,
        "reward must be one of power, log_ratio, None, got 'ratio'",
    ),
    (opd, {"reward": None}, ValueError, "advantages must be given with reward=None"),
    (
        opd,
        {"reward": None, "advantages": LP},
        ValueError,
        "teacher_logprobs must be given exactly where there is",
    ),
    (
        opd,
        {"teacher_logprobs": None},
        ValueError,
        "teacher_logprobs must be given exactly where there is a reward",
    ),
    (
        opd,
        {"teacher_logprobs": LP[1:]},
        ValueError,
        "teacher_logprobs must be a float tensor [T] with T=4",
    ),
    (
        opd,
        {"clip": 1.0},
        ValueError,
        "clip and tanh_scale belong to reward='log_ratio', got reward='power'",
    ),
    (opd, {"alpha": -2.0}, ValueError, "alpha must be finite, at least 0, got -2.0"),
    (opd, {"denominator": -1}, ValueError, "denominator must be above 0"),
    (opd, {"loss_scale": "1"}, TypeError, "loss_scale must be a number or a 0-dim tensor, got str"),
    (opd, {"entropy_coef": math.nan}, ValueError, "entropy_coef must be finite"),
    (opd, {"weights": IDS}, TypeError, "weights must be a float tensor [T], got dtype torch.int64"),
    (
        opd,
        {"token_ids": TOP},
        ValueError,
        "token_ids must be an int64 tensor [T], got shape [4, 2]",
    ),
    (opd, {"token_ids": IDS + 6}, IndexError, "token_ids must lie in [0, 9)"),
    (
        divergence,
        {"teacher_logits": Z[:, 1:]},
        ValueError,
        "valid_vocab_size must be given where the vocabularies",
    ),
    (
        divergence,
        {"teacher_logits": Z[1:]},
        ValueError,
        "teacher_logits must be a float tensor [T, v] with T=4",
    ),
    (
        divergence,
        {"divergence": "kl"},
        ValueError,
        "divergence must be one of reverse_kl, forward_kl, jsd, power",
    ),
    (
        divergence,
        {"beta": 1.5},
        ValueError,
        "beta must be finite, at least 0 and at most 1, got 1.5",
    ),
    (
        divergence,
        {"divergence": "power", "alpha": 0.0, "normalization": "none"},
        ValueError,
        "alpha must be above 0",
    ),
    (divergence, {"token_ids": IDS + 6}, IndexError, "token_ids must lie in [0, 9)"),
    (
        linear,
        {"teacher_weight": W[:, 1:]},
        ValueError,
        "teacher_weight must be a float tensor [v, h] with h=3",
    ),
    (
        linear,
        {"teacher_logit_softcap": 0},
        ValueError,
        "teacher_logit_softcap must be finite, above 0, got 0",
    ),
    (
        linear,
        {"teacher_weight": W[1:]},
        ValueError,
        "valid_vocab_size must be given where the vocabularies differ",
    ),
    (support, {"support_ids": TOP + 9}, IndexError, "support_ids must lie in [0, 9)"),
    (
        support,
        {"teacher_logprobs": TOP_LP[:, :1], "support_ids": TOP},
        ValueError,
        "support_ids must be an int64 tensor [T, K] with K=1 as in teacher_logprobs",
    ),
    (
        support,
        {"tail": "drop"},
        ValueError,
        "tail must be one of bucket, ignore, renormalize, got 'drop'",
    ),
    (
        support,
        {"tail": "ignore", "teacher_tail_logprob": LP},
        ValueError,
        "teacher_tail_logprob belongs to tail=",
    ),
    (
        views,
        {"teacher_hidden": X[1:]},
        ValueError,
        "teacher_hidden must be a float tensor [T, H] with T=4",
    ),
    (
        views,
        {"divergence": "power"},
        ValueError,
        "divergence must be one of reverse_kl, forward_kl, jsd, got 'power'",
    ),
    (
        views,
        {"stop_grad": "student"},
        ValueError,
        "stop_grad must be one of teacher, none, got 'student'",
    ),
    (
        views,
        {"tail": "ignore"},
        ValueError,
        "tail must be one of renormalize, bucket, got 'ignore'",
    ),
    (views, {"top_k": 10}, ValueError, "top_k must lie in [1, 9], got 10"),
]


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    BAD,
    ids=[f"{call.__name__}-{'-'.join(change)}-{i}" for i, (call, change, *_) in enumerate(BAD)],
)
def test_bad_input(call, change, error, message):
    call()  # the unchanged call is fine
    with pytest.raises(error) as caught:
        call(**change)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_a_head_that_zero_3_has_taken_away():
    weight = torch.empty(0)
    weight.ds_shape = (9, 4)  # what DeepSpeed leaves outside the owner's forward
    with pytest.raises(ValueError, match="lm_head_weight is sharded by ZeRO-3 and not gathered"):
        score(lm_head_weight=weight)


def test_backend(monkeypatch):
    monkeypatch.setattr("kernels.backend.interpreted", lambda: False)
    kernels.set_backend("auto")
    assert kernels.active_backend("cpu") == "torch"
    assert kernels.active_backend(torch.device("cuda")) == "triton"
    kernels.set_backend("torch")
    assert kernels.active_backend("cuda") == "torch"
    kernels.set_backend("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="backend triton needs an NVIDIA GPU"):
        kernels.power_reward(torch.zeros(2), torch.zeros(2), 1.0)
    # A run on a GPU standardises its rewards on the CPU.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert kernels.power_reward(torch.zeros(2), torch.zeros(2), 1.0).tolist() == [0, 0]
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        kernels.set_backend("cuda")


def test_public_names():
    assert set(kernels.__all__) <= set(dir(kernels))
    assert all(getattr(kernels, name).__doc__ for name in kernels.__all__)
