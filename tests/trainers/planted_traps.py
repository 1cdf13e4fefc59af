"""Components with the mistakes of docs/specification.md, 7, one class each.

test_objectives.py puts them through the conformance suite by their dotted paths.
"""

import numpy as np
import torch

import kernels
from rollouts.engines.huggingface import HuggingFaceEngine
from trainers.losses import Loss
from trainers.opd import OnPolicyDistillation


class DifferentiatedEstimate:
    """A loss that differentiates a sampled estimate of the KL, per token: mistake 1."""

    def __init__(self, vocab, estimate):
        self.vocab, self.estimate = vocab, estimate

    def __call__(self, head, hidden, batch, denominator):
        scored = kernels.fused_linear_logprobs(
            hidden, head.weight, batch.targets, bias=head.bias, valid_vocab_size=self.vocab
        ).logprobs
        gap = batch.annotations["teacher_logprobs"] - scored
        values = -gap if self.estimate == "k1" else torch.expm1(gap) - gap
        loss = values.masked_fill(~batch.mask, 0).sum() / denominator
        return {"loss": loss, "logprobs": scored.detach()}


class K1(OnPolicyDistillation):
    def loss(self):
        return DifferentiatedEstimate(self.run.vocab, "k1")


class K3(OnPolicyDistillation):
    """It says reverse KL, and has the forward KL's gradient."""

    minimises = "reverse_kl"

    def loss(self):
        return DifferentiatedEstimate(self.run.vocab, "k3")


class K3AsItIs(K3):
    minimises = "forward_kl"


class Constant:
    """A reward that does not depend on the sampled token: mistake 2."""

    fused = None
    window = False

    def __init__(self, config):
        pass

    def __call__(self, teacher_logprobs, student_logprobs):
        return torch.full_like(student_logprobs, 0.3)


class Advantages(OnPolicyDistillation):
    """Base of trainers that write rewards as advantages."""

    def annotate(self, trajectories):
        super().annotate(trajectories)
        self.run.score_policy(trajectories)
        for trajectory in trajectories:
            notes = trajectory.annotations
            notes["advantages"] = self.rewards(
                notes["teacher_logprobs"].astype(np.float32),
                notes["student_logprobs"].astype(np.float32),
            )

    def rewards(self, teacher, student):
        return teacher - student

    def loss(self):
        return Loss(
            policy_gradient=True,
            vocab=self.run.vocab,
            temperature=self.config.rollout.temperature,
        )


class OfThePlace(Advantages):
    """An advantage of the place, as a sum over the top-k has it, not of its token: mistake 2."""

    def rewards(self, teacher, student):
        return np.full(len(teacher), 0.7, np.float32)


class Shifted(Advantages):
    """The teacher's log-probs are shifted by one: mistake 3."""

    def rewards(self, teacher, student):
        return np.roll(teacher, 1) - student


class Inverted:
    """q^5 - p^5: mistake 4."""

    fused = None
    window = False

    def __init__(self, config):
        pass

    def __call__(self, teacher_logprobs, student_logprobs):
        return -kernels.power_reward(teacher_logprobs, student_logprobs, 5, normalization="none")


class InvertedAdvantage(Advantages):
    """The same in a trainer."""

    def rewards(self, teacher, student):
        return student - teacher


class OwnDivisor(Loss):
    """A loss that divides by the tokens of its micro-batch: mistake 5."""

    def __call__(self, head, hidden, batch, denominator):
        return super().__call__(head, hidden, batch, max(float(batch.mask.sum()), 1.0))


class PerMicroBatch(OnPolicyDistillation):
    def loss(self):
        return OwnDivisor(policy_gradient=True, reward=self.reward, vocab=self.run.vocab)


class OtherTemperature(OnPolicyDistillation):
    """`rollout.temperature` reaches the sampler and not the loss: mistake 6."""

    def loss(self):
        return Loss(policy_gradient=True, reward=self.reward, vocab=self.run.vocab)


class AllTokens(Loss):
    """A loss that counts what is masked, padding too: mistake 7."""

    def __call__(self, head, hidden, batch, denominator):
        batch.annotations["mask"] = torch.ones_like(batch.mask)
        return super().__call__(head, hidden, batch, denominator)


class CountsPadding(OnPolicyDistillation):
    def loss(self):
        return AllTokens(
            policy_gradient=True,
            reward=self.reward,
            vocab=self.run.vocab,
            temperature=self.config.rollout.temperature,
        )


class Stale(HuggingFaceEngine):
    """An engine that says it took the weights, and samples from its old ones: mistake 8."""

    def load_weights(self, weights):
        self.told = dict(weights)

    def fingerprints(self, names, salt):
        from rollouts.sync import fingerprint

        return {name: fingerprint(self.told[name], name, salt) for name in names}


class Silent(HuggingFaceEngine):
    """An engine that ignores the weights."""

    def load_weights(self, weights):
        pass
