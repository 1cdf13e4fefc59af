"""The three loss primitives that every method is made of, on packed tokens, through the fused head kernels.

    policy gradient   - sum_t  w_t (A_t + r_t) log pi(y_t) / N     A: given advantage, r: token reward, detached
    cross-entropy     - sum_t  c_t log pi(y_t) / N
    divergence          sum_t  w_t D(teacher_t, pi_t) / N

A method does not call them: it writes annotations [T] on its trajectories (`mask`, `advantages`,
`teacher_logprobs`, `ce_weights`, …) and names a `Loss`. N is the step's count of unmasked tokens over all
micro-batches and ranks, so the split does not change the gradient. Temperature, bias, soft-cap and padded
vocabulary rows are the kernels' business.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels


@dataclass
class Loss:
    """Which primitives a method uses, and with what.

    `reward`: a token reward (rewards/token.py) for the policy gradient, or None: `advantages` alone.
    `divergence`: a full-vocabulary objective's keyword arguments for the kernels, or None; it needs the
    teacher's `head` and the annotation `teacher_hidden` [T, H_teacher].
    """

    policy_gradient: bool = False
    cross_entropy: bool = False
    divergence: dict | None = None
    reward: object | None = None
    teacher_head: object | None = None
    temperature: float = 1.0
    vocab: int | None = None  # valid vocabulary: rows past it are padding

    def __call__(self, head, hidden: torch.Tensor, batch, denominator: float) -> dict[str, torch.Tensor]:
        """The micro-batch's loss and, detached, what the metrics need.

        Args:
            head: the policy's head (weight [V, H]).
            hidden: [T, H], differentiable.
            batch: a `MicroBatch` with the annotations the primitives need.
            denominator: N above.

        Returns:
            `loss` (scalar), and [T] float32: `logprobs`, `entropy` (nats), `rewards`, `divergence` as they apply.
        """
        shared = dict(mask=batch.mask, denominator=denominator, **head_options(head, self.temperature, self.vocab))
        notes = batch.annotations
        output: dict[str, torch.Tensor] = {}
        terms = []
        if self.policy_gradient and self.reward is not None and self.reward.fused is None and not self.reward.window:
            terms.append(self._unfused(head, hidden, batch, shared, output))
        elif self.policy_gradient or self.cross_entropy:
            kind = self.reward.fused if self.policy_gradient and self.reward and self.reward.fused else {"reward": None}
            advantages = notes.get("advantages") if self.policy_gradient else None
            if self.cross_entropy:  # its own weights add to the advantages: REINFORCE with A = 1 is cross-entropy
                weights = notes["ce_weights"]
                advantages = weights if advantages is None else advantages + weights
            result = kernels.fused_linear_opd_loss(
                hidden, head.weight, batch.targets, notes.get("teacher_logprobs") if kind["reward"] else None,
                advantages=advantages, return_entropy=True, **kind, **shared)
            output |= {"logprobs": result.logprobs, "entropy": result.entropy}
            if self.policy_gradient:
                output["rewards"] = result.rewards if advantages is None else result.rewards + advantages
            terms.append(result.loss)
        if self.divergence:
            terms.append(self._divergence(head, hidden, batch, shared, output))
        output["loss"] = sum(terms)
        return output

    def _unfused(self, head, hidden, batch, shared, output) -> torch.Tensor:
        """Any registered reward: log-probs, then reward, then the policy gradient."""
        options = {name: value for name, value in shared.items() if name != "denominator"}
        scored = kernels.fused_linear_logprobs(hidden, head.weight, batch.targets, return_entropy=True, **options)
        rewards = self.reward(batch.annotations["teacher_logprobs"], scored.logprobs.detach()).detach()
        advantages = batch.annotations.get("advantages")
        total = rewards if advantages is None else rewards + advantages
        output |= {"logprobs": scored.logprobs.detach(), "entropy": scored.entropy.detach(), "rewards": rewards}
        return kernels.policy_gradient_loss(scored.logprobs, total, mask=batch.mask,
                                            denominator=shared["denominator"]).loss

    def _divergence(self, head, hidden, batch, shared, output) -> torch.Tensor:
        kind = dict(self.divergence)
        teacher_hidden = batch.annotations["teacher_hidden"].to(self.teacher_head.weight.dtype)
        counted = {name: shared[name] for name in ("mask", "denominator")}
        if "top_k" in kind:
            result = self._top_k(head, hidden, teacher_hidden, kind, shared)
            with torch.no_grad():  # for the metrics
                scored = kernels.fused_linear_logprobs(hidden.detach(), head.weight.detach(), batch.targets,
                                                       mask=batch.mask, return_entropy=True,
                                                       **head_options(head, self.temperature, self.vocab))
        else:
            result = scored = kernels.fused_linear_distillation_divergence(
                hidden, head.weight, teacher_hidden, self.teacher_head.weight, token_ids=batch.targets,
                student_bias=head.bias, student_logit_softcap=head.softcap, teacher_bias=self.teacher_head.bias,
                teacher_logit_softcap=self.teacher_head.softcap, temperature=self.temperature,
                valid_vocab_size=self.vocab, return_entropy=True, **kind, **counted)
        output |= {"logprobs": scored.logprobs, "entropy": scored.entropy, "divergence": result.divergence,
                   "rewards": -result.divergence}
        return result.loss

    def _top_k(self, head, hidden, teacher_hidden, kind: dict, shared: dict):
        top_k, support = kind.pop("top_k"), kind.pop("support")
        teacher_side = head_options(self.teacher_head, self.temperature, self.vocab)
        if support == "teacher":
            ids, teacher_logprobs, _ = kernels.fused_linear_topk_logprobs(
                teacher_hidden, self.teacher_head.weight, top_k, **teacher_side)
        else:
            ids = kernels.fused_linear_topk_logprobs(
                hidden.detach(), head.weight.detach(), top_k, **head_options(head, self.temperature, self.vocab))[0]
            teacher_logprobs = kernels.fused_linear_logprobs(teacher_hidden, self.teacher_head.weight, ids,
                                                             **teacher_side).logprobs
        return kernels.topk_distillation_divergence(hidden, head.weight, ids, teacher_logprobs, **kind, **shared)


def head_options(head, temperature: float, vocab: int | None) -> dict:
    """The keyword arguments that describe a head to the kernels."""
    return {"bias": head.bias, "logit_softcap": head.softcap, "temperature": temperature, "valid_vocab_size": vocab}


def score_tokens(head, hidden: torch.Tensor, batch, *, targets: torch.Tensor, temperature: float,
                 vocab: int | None):
    """Log-probs [T] of `targets` in nats, with the most likely token's, without gradients."""
    with torch.no_grad():
        return kernels.fused_linear_logprobs(hidden.detach(), head.weight.detach(), targets,
                                             return_max_logprob=True, **head_options(head, temperature, vocab))
