"""The three loss primitives that every method is made of, on packed tokens.

    policy gradient   - sum_t  w_t (A_t + r_t) log pi(y_t) / N
    cross-entropy     - sum_t  c_t log pi(y_t) / N
    divergence          sum_t  w_t D(teacher_t, pi_t) / N

A is a given advantage, r a token reward, detached. PPO's clipped ratio may stand in place of log pi,
and beta times the KL to a reference may be added. The teacher of a divergence is another model, or
another row of this one.

A method does not call the primitives. It writes annotations [T] on its trajectories (`mask`,
`advantages`, `teacher_logprobs`, `ce_weights`, …) and names a `Loss`. N and the weights w are the
loop's (`train.normalizer`); w is 1 without the annotation `weights`. N is counted over all
micro-batches and ranks, so the split does not change the gradient. Temperature, bias, soft-cap and
padded vocabulary rows are the kernels' business.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import kernels
from trainers.core.scoring import head_options

# nats; a reference that likes a sampled token e^20 times better is broken data, not signal
MAX_GAP = 20.0


@dataclass
class Loss:
    """Which primitives a method uses, and with what.

    `reward`: a token reward (rewards/token.py) for the policy gradient, or None: `advantages`
        alone.
    `objective`: the kernels' keyword arguments for another objective than REINFORCE, e.g. PPO's
    with its clip bounds; the ratio is to the annotation `old_logprobs` [T], or 1 without it. With
    `is_cap` in it, the truncated importance weight against the annotation `rollout_logprobs` [T].
    `self_distillation`: keyword arguments for the kernels' divergence between two rows of the same
    sequence, in nats, or None. A token's teacher is the row that is `teacher_distance` [T] before
    its own, 0 for none; it counts by `kl_weights` [T].
    `kl_beta`: adds this times the k3 estimate of KL(policy || reference), from the annotation
        `reference_logprobs` [T].
    `divergence`: a full-vocabulary objective's keyword arguments for the kernels, or None; it needs
    the teacher's `head` and the annotation `teacher_hidden` [T, H_teacher]."""

    policy_gradient: bool = False
    cross_entropy: bool = False
    divergence: dict | None = None
    self_distillation: dict | None = None
    reward: object | None = None
    objective: dict = field(default_factory=dict)
    kl_beta: float = 0.0
    teacher_head: object | None = None
    temperature: float = 1.0
    vocab: int | None = None  # valid vocabulary: rows past it are padding

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
            batch: a `MicroBatch` with the annotations the primitives need.
            denominator: N above.

        Returns:
            `loss` (scalar), and [T] float32: `logprobs`, `entropy` (nats), `rewards`, `divergence`,
            `kl` (nats), `clipped` (0 or 1) as they apply.
        """
        notes = batch.annotations
        shared = dict(
            mask=batch.mask,
            denominator=denominator,
            weights=notes.get("weights"),
            **head_options(head, self.temperature, self.vocab),
        )
        output: dict[str, torch.Tensor] = {}
        terms = []
        custom = self.reward is not None and self.reward.fused is None and not self.reward.window
        if self.policy_gradient and (custom or self.kl_beta):
            terms.append(self._unfused(head, hidden, batch, shared, output))
        elif self.policy_gradient or self.cross_entropy:
            kind = (
                self.reward.fused
                if self.policy_gradient and self.reward and self.reward.fused
                else {"reward": None}
            )
            advantages = notes.get("advantages") if self.policy_gradient else None
            # its own weights add to the advantages: REINFORCE with A = 1 is cross-entropy
            if self.cross_entropy:
                weights = notes["ce_weights"]
                advantages = weights if advantages is None else advantages + weights
            result = kernels.fused_linear_opd_loss(
                hidden,
                head.weight,
                batch.targets,
                notes.get("teacher_logprobs") if kind["reward"] else None,
                advantages=advantages,
                old_logprobs=notes.get("old_logprobs"),
                rollout_logprobs=notes.get("rollout_logprobs"),
                return_entropy=True,
                **self.objective,
                **kind,
                **shared,
            )
            output |= {"logprobs": result.logprobs, "entropy": result.entropy}
            if self.policy_gradient:
                output["rewards"] = (
                    result.rewards if advantages is None else result.rewards + advantages
                )
            terms.append(result.loss)
        if "old_logprobs" in notes and self.objective.get("objective") == "ppo_clip":
            ratio, gain = (output["logprobs"] - notes["old_logprobs"]).exp(), output["rewards"]
            output["clipped"] = torch.where(
                gain > 0,
                ratio > 1 + self.objective["clip_high"],
                (gain < 0) & (ratio < 1 - self.objective["clip_low"]),
            ).float()
        if self.divergence:
            terms.append(self._divergence(head, hidden, batch, shared, output))
        if self.self_distillation and "teacher_distance" in notes:
            terms.append(self._self_distillation(head, hidden, batch, denominator, output))
        output["loss"] = sum(terms)
        return output

    def _unfused(self, head, hidden, batch, shared, output) -> torch.Tensor:
        """Any registered reward, or a KL to the reference: log-probs, then reward, then the policy
        gradient.

        The KL goes through autograd on the log-probs, not into the advantages: there a clipped
        ratio would scale it."""
        notes, weights, denominator = batch.annotations, shared["weights"], shared["denominator"]
        options = {
            name: value for name, value in shared.items() if name not in ("denominator", "weights")
        }
        scored = kernels.fused_linear_logprobs(
            hidden, head.weight, batch.targets, return_entropy=True, **options
        )
        rewards = notes.get("advantages")
        if self.reward is not None:
            own = self.reward(notes["teacher_logprobs"], scored.logprobs.detach()).detach()
            rewards = own if rewards is None else own + rewards
        output |= {
            "logprobs": scored.logprobs.detach(),
            "entropy": scored.entropy.detach(),
            "rewards": rewards,
        }
        loss = kernels.policy_gradient_loss(
            scored.logprobs,
            rewards,
            mask=batch.mask,
            weights=weights,
            old_logprobs=notes.get("old_logprobs"),
            denominator=denominator,
            rollout_logprobs=notes.get("rollout_logprobs"),
            **self.objective,
        ).loss
        if self.kl_beta:
            kl = k3(scored.logprobs, notes["reference_logprobs"]).masked_fill(~batch.mask, 0)
            output["kl"] = kl.detach()
            loss = (
                loss + self.kl_beta * (kl if weights is None else kl * weights).sum() / denominator
            )
        return loss

    def _self_distillation(self, head, hidden, batch, denominator: float, output) -> torch.Tensor:
        distance = batch.annotations["teacher_distance"]
        rows = ((distance > 0) & batch.mask).nonzero().flatten()
        result = kernels.fused_linear_self_distillation_kl(
            hidden.index_select(0, rows),
            hidden.detach().index_select(0, rows - distance[rows]),
            head.weight,
            denominator=denominator,
            weights=batch.annotations["kl_weights"][rows],
            **self.self_distillation,
            **head_options(head, self.temperature, self.vocab),
        )
        output["divergence"] = hidden.new_zeros(
            len(hidden), dtype=result.divergence.dtype
        ).index_copy(0, rows, result.divergence)
        return result.loss

    def _divergence(self, head, hidden, batch, shared, output) -> torch.Tensor:
        kind = dict(self.divergence)
        teacher_hidden = batch.annotations["teacher_hidden"].to(self.teacher_head.weight.dtype)
        counted = {name: shared[name] for name in ("mask", "denominator", "weights")}
        if "top_k" in kind:
            result = self._top_k(head, hidden, teacher_hidden, kind, shared)
            with torch.no_grad():  # for the metrics
                scored = kernels.fused_linear_logprobs(
                    hidden.detach(),
                    head.weight.detach(),
                    batch.targets,
                    mask=batch.mask,
                    return_entropy=True,
                    **head_options(head, self.temperature, self.vocab),
                )
        else:
            result = scored = kernels.fused_linear_distillation_divergence(
                hidden,
                head.weight,
                teacher_hidden,
                self.teacher_head.weight,
                token_ids=batch.targets,
                student_bias=head.bias,
                student_logit_softcap=head.softcap,
                teacher_bias=self.teacher_head.bias,
                teacher_logit_softcap=self.teacher_head.softcap,
                temperature=self.temperature,
                valid_vocab_size=self.vocab,
                return_entropy=True,
                **kind,
                **counted,
            )
        output |= {
            "logprobs": scored.logprobs,
            "entropy": scored.entropy,
            "divergence": result.divergence,
            "rewards": -result.divergence,
        }
        return result.loss

    def _top_k(self, head, hidden, teacher_hidden, kind: dict, shared: dict):
        top_k, support = kind.pop("top_k"), kind.pop("support")
        teacher_side = head_options(self.teacher_head, self.temperature, self.vocab)
        if support == "teacher":
            ids, teacher_logprobs, _ = kernels.fused_linear_topk_logprobs(
                teacher_hidden, self.teacher_head.weight, top_k, **teacher_side
            )
        else:
            ids = kernels.fused_linear_topk_logprobs(
                hidden.detach(),
                head.weight.detach(),
                top_k,
                **head_options(head, self.temperature, self.vocab),
            )[0]
            teacher_logprobs = kernels.fused_linear_logprobs(
                teacher_hidden, self.teacher_head.weight, ids, **teacher_side
            ).logprobs
        return kernels.topk_distillation_divergence(
            hidden, head.weight, ids, teacher_logprobs, **kind, **shared
        )


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate of KL(policy || reference) from sampled tokens [T], nats: exp(r) - r - 1 with r =
    reference - logprobs.

    GRPO's, arXiv 2402.03300 eq. 4; never negative. Its gradient by the log-prob is 1 - exp(r),
    which is in expectation that of the *forward* KL (docs/specification.md, 7): GRPO as it is published, and
    harmless at its small beta."""
    gap = (reference - logprobs).clamp(max=MAX_GAP)
    return torch.expm1(gap) - gap
