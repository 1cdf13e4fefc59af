"""Measures how far a model is from its teacher: KL divergence and agreement on held-out prompts.

    python -m scripts.divergence model=DIR teacher=DIR data=NAME_OR_FILE size=32

The model writes a completion to each prompt, at temperature 1. At each of its tokens both
distributions over the vocabulary are compared, in float32:

    kl         the mean of KL(model || teacher), in nats per token: what on-policy distillation
               lowers
    agreement  the share of tokens at which both have the same most likely token

The result is JSON on the last line of stdout. `data` is anything that `eval.path` takes, with or
without answers, and `split` and `size` choose its rows. Every other key of the config works too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.errors import ConfigError
from scripts.cli import compose_values, key_values, launch, run_command

SHORT_KEYS = {
    "model": "model.path",
    "teacher": "teacher.path",
    "data": "eval.path",
    "size": "eval.size",
    "split": "eval.split",
    "max_new_tokens": "rollout.max_new_tokens",
    "engine": "rollout.engine",
}
if TYPE_CHECKING:
    import torch


def main(arguments: list[str]) -> int:
    """Compare the models that the arguments name; returns the exit status."""
    return run_command(print_divergence, arguments, __doc__, SHORT_KEYS)


def print_divergence(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.divergence",
        usage="model=DIR teacher=DIR data=NAME_OR_FILE size=32",
        required=("model", "teacher", "data"),
    )
    defaults = {"recipe": "opd", "log.wandb": "disabled", "eval.k": "1", "eval.samples": "1"}
    print(json.dumps(measure(compose_values(defaults | values))))


def measure(config) -> dict:
    """Sample from the model, and compare it with its teacher token by token.

    Args:
        config: of a recipe with a teacher; its evaluation data is read.

    Returns:
        `kl` (nats per token), `agreement` (0 to 1), and what they were measured on.

    Raises:
        OnstreamError: a model or the data cannot be used, or there are several teachers.
    """
    from trainers.core.policy import check_model, unshared_tokens
    from trainers.evaluation import draw_completions
    from trainers.prepare import prepare_evaluation

    if config.teachers:
        raise ConfigError(
            "teachers has several, and a model is compared with one; give teacher=DIR"
        )
    if config.teacher.tokenizer == "own":
        raise ConfigError(
            "teacher.tokenizer=own: whole distributions are compared, over the same tokens; leave "
            "it out"
        )
    (tokenizer, _), (teacher_tokenizer, teacher) = (
        check_model(name, section.path, section.trust_remote_code)
        for name, section in (("model", config.model), ("teacher", config.teacher))
    )
    unshared = unshared_tokens(tokenizer, teacher_tokenizer, config.model.path, config.teacher.path)
    run = prepare_evaluation(config, teacher, unshared=unshared, answered=False)
    for message in run.messages:
        print(message, file=sys.stderr)
    trajectories = draw_completions(run, run.mode.evaluation_sampling(run), "divergence")
    run.rollout.close()
    kl, agrees = compare(run, trajectories)
    return {
        "model": config.model.path,
        "teacher": config.teacher.path,
        "data": run.eval_name,
        "prompts": len(run.eval_prompts),
        "tokens": len(kl),
        "kl": float(kl.mean()),
        "kl_standard_error": float(kl.std() / len(kl) ** 0.5),
        "agreement": float(agrees.float().mean()),
    }


def compare(run, trajectories: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(model || teacher) in nats [T], and whether the most likely tokens are the same [T] bool.

    Args:
        run: prepared for evaluation.
        trajectories: with T completion tokens.
    """
    import torch

    import kernels
    from trainers.core.batching import make_microbatches, pack
    from trainers.core.scoring import head_options
    from trainers.core.teacher import FrozenModel

    config = run.config
    student, teacher = (
        FrozenModel(replace(section, dtype="float32"), run).policy
        for section in (config.model, config.teacher)
    )
    divergences, agreements = [], []
    lengths = [trajectory.length for trajectory in trajectories]
    for members in make_microbatches(lengths, config.train.tokens_per_microbatch):
        batch = pack(trajectories, members, run.device)
        with torch.no_grad():
            states = [policy.hidden(batch) for policy in (student, teacher)]
            result = kernels.fused_linear_distillation_divergence(
                states[0],
                student.head.weight,
                states[1],
                teacher.head.weight,
                denominator=1.0,
                divergence="reverse_kl",
                student_bias=student.head.bias,
                teacher_bias=teacher.head.bias,
                student_logit_softcap=student.head.softcap,
                teacher_logit_softcap=teacher.head.softcap,
                valid_vocab_size=run.vocab,
            )
            likeliest = [
                kernels.fused_linear_topk_logprobs(
                    hidden, policy.head.weight, 1, **head_options(policy.head, 1.0, run.vocab)
                ).ids
                for policy, hidden in zip((student, teacher), states)
            ]
        divergences.append(result.divergence)
        agreements.append((likeliest[0] == likeliest[1]).flatten())
    return torch.cat(divergences), torch.cat(agreements)


if __name__ == "__main__":
    launch(main)
