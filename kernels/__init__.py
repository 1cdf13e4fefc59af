"""Exact losses on the LM head: log-probs, token rewards, policy-gradient losses and divergences.

The `fused_linear_*` functions never make the [T, V] logits as a whole.

Letters in shapes: T tokens (packed), V vocabulary, H hidden, K tokens per position. Log-probs are
in nats. Bad input raises TypeError, ValueError or IndexError with one line that names the argument.
"""

from kernels.backend import active_backend, set_backend
from kernels.divergence import DivergenceOutput, distillation_divergence
from kernels.linear_divergence import fused_linear_distillation_divergence
from kernels.logprobs import (
    LogprobOutput,
    TopkOutput,
    fused_linear_logprobs,
    fused_linear_topk_logprobs,
    selective_logprobs,
)
from kernels.opd import OPDOutput, fused_linear_opd_loss
from kernels.policy_loss import PGOutput, policy_gradient_loss
from kernels.rewards import log_ratio_reward, power_reward
from kernels.self_distillation import fused_linear_self_distillation_kl
from kernels.topk_divergence import topk_distillation_divergence

__all__ = [
    "DivergenceOutput",
    "LogprobOutput",
    "OPDOutput",
    "PGOutput",
    "TopkOutput",
    "active_backend",
    "distillation_divergence",
    "fused_linear_distillation_divergence",
    "fused_linear_logprobs",
    "fused_linear_opd_loss",
    "fused_linear_self_distillation_kl",
    "fused_linear_topk_logprobs",
    "log_ratio_reward",
    "policy_gradient_loss",
    "power_reward",
    "selective_logprobs",
    "set_backend",
    "topk_distillation_divergence",
]
