"""Every component that a config key selects by name, and the module that has it.

A module is imported when a run selects one of its components, so a run loads what it uses. A
component from outside is selected by its dotted path, without an entry here (recipes/registry.py).
"""

from __future__ import annotations

from recipes.registry import Registry

TRAINERS = Registry(
    "trainer",
    {
        "opd": "trainers.opd.OnPolicyDistillation",
        "grpo": "trainers.grpo.GRPO",
        "hrpo": "trainers.hrpo.HRPO",
        "sft": "trainers.sft.SupervisedFineTuning",
        "offline_distillation": "trainers.offline_distillation.OfflineDistillation",
        "onpolicy_sft": "trainers.onpolicy_sft.OnPolicySFT",
        "streaming_sft": "trainers.streaming_sft.StreamingSFT",
        "proactivellm": "trainers.proactivellm.ProactiveLLM",
    },
)
ENGINES = Registry(
    "rollout.engine",
    {
        "hf": "rollouts.engines.huggingface.HuggingFaceEngine",
        "vllm": "rollouts.engines.vllm.VllmEngine",
        "streaming": "rollouts.streaming.engine.StreamingEngine",
        "simultaneous": "rollouts.simultaneous.engine.SimultaneousEngine",
    },
)
TOKEN_REWARDS = Registry(
    "reward.token",
    {
        "power": "rewards.token.Power",
        "log_ratio": "rewards.token.LogRatio",
        "clip": "rewards.token.Clip",
        "tanh": "rewards.token.Tanh",
        "zscore": "rewards.token.ZScore",
        "sign": "rewards.token.Sign",
    },
)
TOKEN_SCORES = Registry(
    "reward.select.score",
    {
        "dial": "rewards.selection.Dial",
    },
)
VERIFIERS = Registry(
    "reward.verifier",
    {
        "math": "rewards.math.grade",
        "exact": "rewards.metrics.text.exact_answer",
        "code": "rewards.code.Code",
    },
)
DECISION_HEADS = Registry(
    "proactive.head",
    {
        "entropy": "rollouts.simultaneous.decision.Entropy",
        "attention": "rollouts.simultaneous.decision.Attention",
        "edatt": "rollouts.simultaneous.decision.NewestAttention",
        "wait_k": "rollouts.simultaneous.decision.WaitK",
        "ratio": "rollouts.simultaneous.decision.Ratio",
        "batch": "rollouts.simultaneous.decision.Batch",
    },
)
