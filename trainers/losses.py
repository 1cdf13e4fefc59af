"""The three loss primitives that every method is made of, on packed tokens.

    policy gradient   - sum_t  w_t (A_t + r_t) log pi(y_t) / N
    cross-entropy     - sum_t  c_t log pi(y_t) / N
    divergence          sum_t  w_t D(teacher_t, pi_t) / N

A is a given advantage and r a token reward, both detached. PPO's clipped ratio may stand in place
of log pi, and beta times the KL to a reference may be added. The teacher of a divergence is another
model, or another row of this one.

A method does not call the primitives. It writes annotations [T] on its trajectories (`mask`,
`advantages`, `teacher_logprobs`, `ce_weights`, …) and names a `Loss`. N and the weights w are the
loop's (`train.normalizer`); w is 1 without the annotation `weights`. N is counted over all
micro-batches and ranks, so the split does not change the gradient. Temperature, bias, soft-cap and
padded vocabulary rows are the kernels' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import kernels
from trainers.core.scoring import head_options

# A reference that likes a sampled token e^20 times better is broken data, not signal.
MAX_GAP = 20.0  # nats


@dataclass
class Loss:
    """Which primitives a method uses, and with what.

    Attributes:
        policy_gradient: uses the policy gradient of `reward` and the annotation `advantages` [T].
        cross_entropy: uses cross-entropy, weighted by the annotation `ce_weights` [T].
        divergence: a full-vocabulary objective's keyword arguments for the kernels, or None. It
            needs `teacher_head` and the annotation `teacher_hidden` [T, H_teacher]; with
            `support="cached"`, the annotations `teacher_topk_ids` and `teacher_topk_logprobs`
            [T, K] alone.
        self_distillation: keyword arguments for the kernels' divergence between two rows of one
            sequence, in nats, or None. `teacher_distance[t]` = d > 0 says that the hidden state d
            positions earlier teaches token t; 0 says that none does. `kl_weights[t]` multiplies
            the token's term.
        reward: a token reward (rewards/token.py) for the policy gradient. None: `advantages` alone.
        objective: the kernels' keyword arguments for another objective than REINFORCE, as PPO's
            with its clip bounds. The ratio is to the annotation `old_logprobs` [T], and is 1
            without it. `is_cap` adds the truncated importance weight against the annotation
            `rollout_logprobs` [T].
        kl_beta: adds this times the k3 estimate of KL(policy || reference), from the annotation
            `reference_logprobs` [T].
        teacher_head: the teacher's head (weight [V, H_teacher]), for `divergence`.
        temperature: logits are divided by it, the teacher's too.
        vocab: the valid vocabulary; rows past it are padding. None: all rows are valid.

    Raises:
        ValueError: cross-entropy together with `objective` or `kl_beta`.
    """

    policy_gradient: bool = False
    cross_entropy: bool = False
    divergence: dict[str, Any] | None = None
    self_distillation: dict[str, Any] | None = None
    reward: Any = None
    objective: dict[str, Any] = field(default_factory=dict)
    kl_beta: float = 0.0
    teacher_head: Any = None
    temperature: float = 1.0
    vocab: int | None = None

    def __post_init__(self):
        if self.cross_entropy and (self.objective or self.kl_beta):
            raise ValueError(
                "cross-entropy is REINFORCE with A = 1: not to be mixed with objective or kl_beta"
            )

    def __call__(
        self, head, hidden: torch.Tensor, batch, denominator: float
    ) -> dict[str, torch.Tensor]:
        """The micro-batch's loss and, detached, what the metrics need.

        Args:
            head: the policy's head (weight [V, H]).
            hidden: [T, H], differentiable.
            batch: a `MicroBatch` with the annotations that the primitives need.
            denominator: N above.

        Returns:
            `loss` (scalar), and [T] float32: `logprobs`, `entropy` (nats), `rewards`, `divergence`,
            `kl` (nats), `clipped` (0 or 1) as they apply.
        """
        output: dict[str, torch.Tensor] = {}
        arguments = head, hidden, batch, denominator, output
        terms = []
        if self.policy_gradient and self._differentiates_logprobs:
            terms.append(self._policy_gradient_of_logprobs(*arguments))
        elif self.policy_gradient or self.cross_entropy:
            terms.append(self._fused_policy_gradient(*arguments))
        if self.objective.get("objective") == "ppo_clip" and "old_logprobs" in batch.annotations:
            output["clipped"] = self._clipped(batch, output)
        if self.divergence:
            terms.append(self._divergence(*arguments))
        if self.self_distillation and "teacher_distance" in batch.annotations:
            terms.append(self._self_distillation(*arguments))
        output["loss"] = sum(terms)
        return output

    @property
    def _differentiates_logprobs(self) -> bool:
        """Whether the one-pass kernel does not know the reward, or a KL is added."""
        reward = self.reward
        return bool(self.kl_beta) or (
            reward is not None and reward.fused is None and not reward.window
        )

    def _head_options(self, head) -> dict[str, Any]:
        return head_options(head, self.temperature, self.vocab)

    def _fused_policy_gradient(
        self, head, hidden, batch, denominator: float, output
    ) -> torch.Tensor:
        """Policy gradient or cross-entropy, or their sum, in one pass over the head."""
        annotations = batch.annotations
        fused = self.reward.fused if self.policy_gradient and self.reward is not None else None
        reward = fused or {"reward": None}
        advantages = self._advantages(annotations)
        result = kernels.fused_linear_opd_loss(
            hidden,
            head.weight,
            batch.targets,
            annotations.get("teacher_logprobs") if reward["reward"] else None,
            advantages=advantages,
            old_logprobs=annotations.get("old_logprobs"),
            rollout_logprobs=annotations.get("rollout_logprobs"),
            return_entropy=True,
            **self.objective,
            **reward,
            **_token_weights(batch, denominator),
            **self._head_options(head),
        )
        output |= {"logprobs": result.logprobs, "entropy": result.entropy}
        if self.policy_gradient:
            # The kernel's rewards are without the advantages.
            output["rewards"] = (
                result.rewards if advantages is None else result.rewards + advantages
            )
        return result.loss

    def _advantages(self, annotations: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """[T], the advantages with the weights of the cross-entropy; None without either."""
        advantages = annotations.get("advantages") if self.policy_gradient else None
        if not self.cross_entropy:
            return advantages
        # REINFORCE with A = 1 is cross-entropy, so its weights add to the advantages.
        weights = annotations["ce_weights"]
        return weights if advantages is None else advantages + weights

    def _policy_gradient_of_logprobs(
        self, head, hidden, batch, denominator: float, output
    ) -> torch.Tensor:
        """Policy gradient of any reward, with a KL to the reference: log-probs, reward, loss."""
        annotations = batch.annotations
        scored = kernels.fused_linear_logprobs(
            hidden,
            head.weight,
            batch.targets,
            mask=batch.mask,
            return_entropy=True,
            **self._head_options(head),
        )
        logprobs = scored.logprobs.detach()
        rewards = self._advantages(annotations)
        if self.reward is not None:
            token_rewards = self.reward(judged(self.reward, annotations), logprobs).detach()
            rewards = token_rewards if rewards is None else token_rewards + rewards
        output |= {"logprobs": logprobs, "entropy": scored.entropy.detach(), "rewards": rewards}
        loss = kernels.policy_gradient_loss(
            scored.logprobs,
            rewards,
            old_logprobs=annotations.get("old_logprobs"),
            rollout_logprobs=annotations.get("rollout_logprobs"),
            **_token_weights(batch, denominator),
            **self.objective,
        ).loss
        if self.kl_beta:
            # In the advantages, a clipped ratio would scale the KL.
            loss = loss + self._reference_kl(scored.logprobs, batch, denominator, output)
        return loss

    def _reference_kl(self, logprobs, batch, denominator: float, output) -> torch.Tensor:
        reference = batch.annotations["reference_logprobs"]
        weights = batch.annotations.get("weights")
        kl = k3(logprobs, reference).masked_fill(~batch.mask, 0)
        output["kl"] = kl.detach()
        return self.kl_beta * (kl if weights is None else kl * weights).sum() / denominator

    def _clipped(self, batch, output) -> torch.Tensor:
        """[T] float32: 1 where PPO's bound holds the ratio, so that the token has no gradient."""
        # The kernels' own clip fractions are means over one micro-batch; the metric needs tokens.
        ratio = (output["logprobs"] - batch.annotations["old_logprobs"]).exp()
        gain = output["rewards"]
        above = (gain > 0) & (ratio > 1 + self.objective["clip_high"])
        below = (gain < 0) & (ratio < 1 - self.objective["clip_low"])
        return (above | below).float()

    def _divergence(self, head, hidden, batch, denominator: float, output) -> torch.Tensor:
        """A divergence between the teacher's distribution and the policy's, of all or K tokens."""
        compute = self._topk_divergence if "top_k" in self.divergence else self._full_divergence
        result, scored = compute(head, hidden, batch, denominator)
        output |= {
            "logprobs": scored.logprobs,
            "entropy": scored.entropy,
            "divergence": result.divergence,
            "rewards": -result.divergence,
        }
        return result.loss

    def _teacher_hidden(self, batch) -> torch.Tensor:
        return batch.annotations["teacher_hidden"].to(self.teacher_head.weight.dtype)

    def _full_divergence(self, head, hidden, batch, denominator: float):
        teacher = self.teacher_head
        result = kernels.fused_linear_distillation_divergence(
            hidden,
            head.weight,
            self._teacher_hidden(batch),
            teacher.weight,
            token_ids=batch.targets,
            student_bias=head.bias,
            student_logit_softcap=head.softcap,
            teacher_bias=teacher.bias,
            teacher_logit_softcap=teacher.softcap,
            temperature=self.temperature,
            valid_vocab_size=self.vocab,
            return_entropy=True,
            **self.divergence,
            **_token_weights(batch, denominator),
        )
        return result, result

    def _topk_divergence(self, head, hidden, batch, denominator: float):
        options = dict(self.divergence)
        k, support = options.pop("top_k"), options.pop("support")
        student = self._head_options(head)
        student_weight, student_hidden = head.weight.detach(), hidden.detach()
        if support == "cached":
            names = "teacher_topk_ids", "teacher_topk_logprobs"
            ids, teacher_logprobs = (batch.annotations[name] for name in names)
        else:
            teacher = self._head_options(self.teacher_head)
            teacher_weight, teacher_hidden = self.teacher_head.weight, self._teacher_hidden(batch)
        if support == "teacher":
            ids, teacher_logprobs, _ = kernels.fused_linear_topk_logprobs(
                teacher_hidden, teacher_weight, k, **teacher
            )
        elif support == "student":
            ids, _, _ = kernels.fused_linear_topk_logprobs(
                student_hidden, student_weight, k, **student
            )
            teacher_logprobs = kernels.fused_linear_logprobs(
                teacher_hidden, teacher_weight, ids, **teacher
            ).logprobs
        result = kernels.topk_distillation_divergence(
            hidden,
            head.weight,
            ids,
            teacher_logprobs,
            **options,
            **_token_weights(batch, denominator),
            **student,
        )
        # The top-k kernel returns no log-probs of the sampled tokens; the metrics need them.
        with torch.no_grad():
            scored = kernels.fused_linear_logprobs(
                student_hidden,
                student_weight,
                batch.targets,
                mask=batch.mask,
                return_entropy=True,
                **student,
            )
        return result, scored

    def _self_distillation(self, head, hidden, batch, denominator: float, output) -> torch.Tensor:
        """A divergence between a token's row and the earlier, detached row that teaches it."""
        annotations = batch.annotations
        distance = annotations["teacher_distance"]
        rows = ((distance > 0) & batch.mask).nonzero().flatten()
        result = kernels.fused_linear_self_distillation_kl(
            hidden.index_select(0, rows),
            hidden.detach().index_select(0, rows - distance[rows]),
            head.weight,
            denominator=denominator,
            weights=annotations["kl_weights"][rows],
            **self.self_distillation,
            **self._head_options(head),
        )
        divergence = hidden.new_zeros(len(hidden), dtype=result.divergence.dtype)
        output["divergence"] = divergence.index_copy(0, rows, result.divergence)
        return result.loss


def judged(reward, annotations: Mapping[str, Any]) -> Any:
    """The teacher's log-probs that a token reward reads: [T], or [T, K] of each teacher."""
    return annotations[getattr(reward, "reads", "teacher_logprobs")]


def _token_weights(batch, denominator: float) -> dict[str, Any]:
    """The kernels' keyword arguments that say which tokens count, and for how much."""
    return {
        "mask": batch.mask,
        "weights": batch.annotations.get("weights"),
        "denominator": denominator,
    }


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(policy || reference) from sampled tokens, in nats.

    It is exp(r) - r - 1 with r = reference - logprobs: GRPO's, arXiv 2402.03300 eq. 4, never
    negative. Its gradient by the log-prob is 1 - exp(r). In expectation, that is the gradient of
    the *forward* KL (docs/specification.md, 7). GRPO is published so, and its small beta makes it
    harmless.

    Args:
        logprobs: [T], of the policy.
        reference: [T], of the reference.

    Returns:
        [T].
    """
    gap = (reference - logprobs).clamp(max=MAX_GAP)
    return torch.expm1(gap) - gap
