"""Evaluates a model: Avg@k, Pass@k, mean length and truncated share, as JSON on the last line of stdout.

    python -m scripts.evaluate model=DIR data=NAME_OR_FILE k=8 [samples=16 size=500 engine=hf temperature=0.6 …]

`data` is anything `data.path` takes. Short keys stand for those of the config (`model` for model.path, `k` for
eval.k, …); every other key of the config works too, e.g. `data.suffix='…'` or `rollout.batch_size=64`.
"""
from __future__ import annotations

import json
import os
import sys

SHORT = {"model": "model.path", "data": "eval.path", "k": "eval.k", "samples": "eval.samples", "size": "eval.size",
         "split": "eval.split", "temperature": "eval.temperature", "top_p": "eval.top_p",
         "max_new_tokens": "rollout.max_new_tokens", "engine": "rollout.engine", "dtype": "model.dtype"}


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.compose import compose
    from recipes.errors import ConfigError, OnstreamError

    try:
        overrides, given = ["log.wandb=disabled"], set()
        for argument in arguments:
            key, equals, value = argument.partition("=")
            if not equals:
                raise ConfigError(f"'{argument}' is not KEY=VALUE; see python -m scripts.evaluate's first lines")
            given.add(SHORT.get(key, key))
            overrides.append(f"{SHORT.get(key, key)}={value}")
        for key in ("model.path", "eval.path"):
            if key not in given:
                short = next(s for s, k in SHORT.items() if k == key)
                raise ConfigError(f"{short}=… is missing: python -m scripts.evaluate model=DIR data=NAME_OR_FILE k=8")
        if "recipe" not in given:
            overrides.append("recipe=sft")  # one without a teacher: none is to be made or looked for
        config = compose(overrides)
        print(json.dumps(run(config)))
        return 0
    except OnstreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(config) -> dict:
    """Load, sample, judge; returns the scores with what they were measured on."""
    import torch

    import rollouts.vllm_engine  # noqa: F401  registers itself
    from rewards.math import VERIFIERS
    from rollouts.hf_engine import ENGINES
    from scripts.tiny_models import make_embedded_models
    from trainers.evaluation import eval_prompts, evaluate, max_length
    from trainers.policy import DTYPES, check_model

    make_embedded_models(config)
    engine = ENGINES.resolve(config.rollout.engine)
    verifier = VERIFIERS.resolve(config.reward.verifier)
    tokenizer, model = check_model("model", config.model.path)
    name, prompts, dropped = eval_prompts(config, tokenizer)
    length = max_length(config, prompts, [], getattr(model, "max_position_embeddings", None))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rollout = engine(config.model.path, config, device, DTYPES[config.model.dtype], max_length=length)
    stop_ids = tuple(dict.fromkeys([*tokenizer.stop_ids, *config.rollout.stop_ids]))
    scores, _ = evaluate(rollout, prompts, config, tokenizer, stop_ids, verifier)
    rollout.close()
    return {"model": config.model.path, "data": name, "prompts": len(prompts), "dropped": dropped,
            "samples": config.eval.samples or config.eval.k, **scores}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
