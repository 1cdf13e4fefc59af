"""Turns command-line overrides into one checked config, and every mistake in them into one line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.errors import ConfigError
from recipes.registry import nearest
from recipes.schema import MASKED_LAYOUTS, Config

TREE = Path(__file__).parent
GROUPS = ("recipe", "engine")


def schema_keys(node: type = Config, prefix: str = "") -> set[str]:
    """Every key of the schema as a dotted path, sections included."""
    keys = set()
    hints = get_type_hints(node)
    for item in fields(node):
        keys.add(prefix + item.name)
        if is_dataclass(hints[item.name]):
            keys |= schema_keys(hints[item.name], f"{prefix}{item.name}.")
    return keys


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse an unknown key or group choice, naming the nearest valid one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys = schema_keys()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"'{text}' is not KEY=VALUE; quote values that hold spaces, commas or '='"
            ) from error
        key = override.key_or_group
        if key in GROUPS:
            choices = {path.stem for path in (TREE / key).glob("*.yaml")}
            if override.value() not in choices:
                raise ConfigError(
                    f"{key}={override.value()} is not known{nearest(str(override.value()), choices)}"
                )
        elif override.is_add() or override.is_delete() or key not in keys:
            raise ConfigError(_no_such_key(key))
        elif any(name.startswith(key + ".") for name in keys):
            raise ConfigError(
                f"'{key}' is a section, not a value; set one of its keys, as in '{key}.…=…'"
            )


def _no_such_key(key: str) -> str:
    keys, leaf = schema_keys(), key.rsplit(".", 1)[-1]
    same = [name for name in keys if name.rsplit(".", 1)[-1] == leaf]
    hint = f"; did you mean '{sorted(same)[0]}'?" if same else nearest(key, keys)
    if len(hint) > 200:
        hint = "; `python train.py dry_run=true` prints every key"
    return f"there is no key '{key}'{hint}"


def compose(overrides: list[str]) -> DictConfig:
    """The resolved config of a run.

    Args:
        overrides: Hydra overrides, e.g. `["recipe=poweropd", "train.steps=10"]`.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value; one line that names the
            key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    if not OmegaConf.has_resolver("now"):
        started = datetime.now()
        OmegaConf.register_new_resolver("now", started.strftime)
    check_overrides(overrides)
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(TREE), version_base="1.3"):
            config = hydra_compose("config", overrides=overrides)
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    except HydraException as error:
        cause = error.__cause__
        raise ConfigError(
            _one_line(cause if isinstance(cause, OmegaConfBaseException) else error)
        ) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; give one, as in '{missing[0]}=…'")
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dictionaries, lists and values.

    Args:
        config: what `compose` returns, or a mapping, such as a loaded config.yaml.
    """
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config)
    return _plain(asdict(config) if is_dataclass(config) else config)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def to_yaml(config: Any) -> str:
    """The config as YAML, which `compose` reads again."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(config: Any) -> dict[str, Any]:
    """The config's values by dotted key, as in `{"train.steps": 10}`; lists stay whole."""
    return dict(_leaves(to_dict(config)))


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def replaced(config: DictConfig, changes: Mapping[str, Any]) -> DictConfig:
    """A new config with some values replaced; `config` stays as it is.

    Args:
        changes: the new values by dotted key, as in `{"run.dir": "outputs/mine"}`.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.
    """
    changed = config.copy()
    for key, value in changes.items():
        if key not in schema_keys():
            raise ConfigError(_no_such_key(key))
        try:
            OmegaConf.update(changed, key, _plain(value))
        except OmegaConfBaseException as error:
            raise ConfigError(_one_line(error)) from error
    validate(changed, int(os.environ.get("WORLD_SIZE", "1")))
    return changed


def _one_line(error: Exception) -> str:
    message = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key else message


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "teacher.dtype": ("float32", "bfloat16", "float16"),
    "model.attn_implementation": ("packed", "flash_attention_2", "flex_attention", "sdpa", "eager"),
    "data.template": ("auto", "chat", "plain"),
    "objective": ("policy_gradient", "reverse_kl", "forward_kl", "jsd", "topk", "power_full"),
    "reward.normalization": ("none", "box_cox"),
    "reward.terminal_stop": ("raw", "mask", "relabel", "cross_eos"),
    "divergence.top_k_support": ("teacher", "student"),
    "divergence.top_k_tail": ("renormalize", "bucket"),
    "divergence.top_k_direction": ("reverse_kl", "forward_kl"),
    "hrpo.granularity": ("stage", "sentence", "boundary_token"),
    "streaming.layout": (None, "grouped", "interleaved", "batch", "scheduled"),
    "streaming.unit": ("word", "sentence"),
    "proactive.schedule": ("uniform", "early", "late", "diagonal"),
    "proactive.top_k_tail": ("renormalize", "bucket"),
    "train.normalizer": (
        "window_token_mean",
        "token_mean",
        "sequence_mean",
        "max_length",
        "microbatch_token_mean",
    ),
    "train.schedule": ("constant", "linear", "cosine"),
    "engine.zero_stage": (0, 1, 2, 3),
    "kernels.backend": ("auto", "triton", "torch"),
    "log.wandb": ("auto", "online", "offline", "disabled"),
}

# key: (test, what the value must be)
_positive = (lambda v: v > 0, "above 0")
_at_least_0 = (lambda v: v >= 0, "0 or more")
_at_least_1 = (lambda v: v >= 1, "1 or more")
_share = (lambda v: 0 < v <= 1, "above 0 and at most 1")
BOUNDS = {
    "reward.alpha": _positive,
    "reward.clip": _positive,
    "reward.tanh_scale": _positive,
    "divergence.jsd_beta": (lambda v: 0 < v < 1, "between 0 and 1"),
    "divergence.top_k": _at_least_1,
    "data.max_prompt_tokens": _at_least_1,
    "data.stories": _at_least_1,
    "data.difficulty": _at_least_1,
    "data.distractors": _at_least_0,
    "rollout.samples_per_prompt": _at_least_1,
    "rollout.max_new_tokens": _at_least_1,
    "rollout.temperature": _positive,
    "rollout.top_p": _share,
    "rollout.gpu_memory_utilization": _share,
    "rollout.top_k": (lambda v: v == -1 or v >= 1, "-1 (off) or 1 or more"),
    "rollout.max_new_tokens_schedule": (
        lambda v: (
            all(len(row) == 2 and min(row) >= 1 for row in v)
            and [r[0] for r in v] == sorted(r[0] for r in v)
        ),
        "pairs [step, max_new_tokens] in the order of their steps, as in [[50,60],[100,40]]",
    ),
    "grpo.gamma": _at_least_0,
    "grpo.kl_beta": _at_least_0,
    "grpo.clip_high": _at_least_0,
    "grpo.clip_low": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "hrpo.local_weight": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "hrpo.format_weight": _at_least_0,
    "hrpo.streaming_weight": _at_least_0,
    "hrpo.deep_weight": _at_least_0,
    "hrpo.deep_credit": _at_least_0,
    "proactive.batch_weight": _at_least_0,
    "proactive.stream_weight": _at_least_0,
    "proactive.kl_weight": _at_least_0,
    "proactive.top_k": _at_least_1,
    "proactive.schedules": _at_least_1,
    "proactive.calibration_size": _at_least_1,
    "proactive.quantile": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "proactive.min_lag": _at_least_0,
    "streaming.max_thought_tokens": (lambda v: v >= 2, "2 or more: one token and the closing one"),
    "streaming.target_offset": _at_least_0,
    "streaming.unit_seconds": _positive,
    "streaming.words_per_minute": _positive,
    "rollout.cpu_kv_cache_gib": _positive,
    "rollout.batch_size": _at_least_1,
    "train.steps": _at_least_0,
    "train.lr": _positive,
    "train.prompts_per_step": _at_least_1,
    "train.minibatches": _at_least_1,
    "train.tokens_per_microbatch": _at_least_1,
    "train.eps": _positive,
    "train.weight_decay": _at_least_0,
    "train.warmup_steps": _at_least_0,
    "train.max_grad_norm": _at_least_0,
    "train.betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
    "eval.every": (lambda v: v >= -1, "-1 (never), 0 (start and end) or 1 or more"),
    "eval.k": _at_least_1,
    "eval.size": _at_least_1,
    "eval.temperature": _at_least_0,
    "eval.top_p": _share,
    "checkpoint.every": _at_least_0,
    "checkpoint.keep": _at_least_1,
    "log.completions": _at_least_0,
    "log.every": _at_least_1,
}
OPTIONAL_BOUNDS = {
    "data.limit": _at_least_1,
    "eval.max_new_tokens": _at_least_1,
    "rollout.fixed_steps": _at_least_1,
    "streaming.seconds_per_token": _positive,
    "proactive.max_reads": _at_least_1,
    "proactive.max_lag": _at_least_1,
    "grpo.importance_cap": _positive,
}


def validate(config: DictConfig, world_size: int) -> None:
    """Refuse impossible values and combinations.

    Args:
        config: the resolved config.
        world_size: the number of ranks.

    Raises:
        ConfigError: one line that names the key.
    """
    for key, choices in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in choices:
            hint = (
                nearest(value, filter(None, choices))
                if isinstance(value, str)
                else f"; one of: {', '.join(map(str, choices))}"
            )
            raise ConfigError(f"{key}={value} is not known{hint}")
    for key, (test, wanted) in (BOUNDS | OPTIONAL_BOUNDS).items():
        value = OmegaConf.select(config, key)
        if not (value is None and key in OPTIONAL_BOUNDS) and not test(value):
            raise ConfigError(f"{key}={value} must be {wanted}")
    if config.train.prompts_per_step < world_size:
        raise ConfigError(
            f"train.prompts_per_step={config.train.prompts_per_step} is less than the {world_size} "
            f"ranks; give at least {world_size}, or start fewer ranks"
        )
    if config.train.prompts_per_step % config.train.minibatches:
        raise ConfigError(
            f"train.prompts_per_step={config.train.prompts_per_step} must be a multiple of "
            f"train.minibatches={config.train.minibatches}"
        )
    if (prompts := config.train.prompts_per_step // config.train.minibatches) < world_size:
        raise ConfigError(
            f"train.minibatches={config.train.minibatches} leaves an update {prompts} prompts, less than "
            f"the {world_size} ranks; lower it, or raise train.prompts_per_step"
        )
    layout, sampler = config.streaming.layout, config.rollout.engine
    right = MASKED_LAYOUTS.get(layout, "vllm or hf")
    if sampler in {"hf", "vllm", "streaming", "simultaneous"} - set(right.split(" or ")):
        raise ConfigError(
            f"rollout.engine={sampler} cannot sample with streaming.layout={layout}; use "
            f"rollout.engine={right}"
        )
    if config.proactive.curve and layout != "scheduled":
        raise ConfigError(
            f"proactive.curve={list(config.proactive.curve)} needs streaming.layout=scheduled, as in "
            "recipe=proactivellm"
        )
    if config.eval.samples is not None and config.eval.samples < config.eval.k:
        raise ConfigError(
            f"eval.samples={config.eval.samples} must be at least eval.k={config.eval.k}"
        )
    if config.engine.offload_params and config.engine.zero_stage != 3:
        raise ConfigError(
            "engine.offload_params=true needs engine.zero_stage=3, as in engine=zero3_offload"
        )
    if config.engine.offload_optimizer and config.engine.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage=1 or more")
