"""The config: recipes compose, and every mistake ends in one line that names the key."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from recipes.components import DECISION_HEADS, ENGINES, TOKEN_REWARDS, TRAINERS, VERIFIERS
from recipes.compose import (
    TREE,
    compose,
    flatten,
    replaced,
    schema_keys,
    to_dict,
    to_yaml,
    validate,
)
from recipes.errors import ConfigError
from recipes.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (TREE / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_names_itself(recipe):
    assert compose([f"recipe={recipe}"]).recipe == recipe


def test_the_paper_preset_has_the_papers_numbers():
    config = compose(["recipe=poweropd_paper"])
    assert (config.train.lr, config.train.steps, config.train.prompts_per_step) == (5e-7, 1500, 32)
    assert (config.rollout.top_p, config.rollout.top_k, config.rollout.max_new_tokens) == (
        0.95,
        20,
        1024,
    )
    assert config.reward.alpha == 5 and config.train.schedule == "constant"
    assert (config.model.path, config.teacher.path) == ("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-4B")


def test_the_on_policy_sft_preset_has_its_papers_numbers():
    config = compose(["recipe=onpolicy_sft_paper"])
    train, rollout = config.train, config.rollout
    assert (train.lr, train.warmup_steps, train.weight_decay, train.max_grad_norm) == (
        1e-6,
        5,
        0.01,
        1.0,
    )
    assert (
        train.prompts_per_step,
        rollout.samples_per_prompt,
        train.prompts_per_step // train.minibatches,
    ) == (32, 32, 8)
    assert (rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k) == (
        3500,
        1,
        1,
        -1,
    )
    assert train.normalizer == "max_length" and config.data.max_prompt_tokens == 1024


def test_grpo_differs_from_on_policy_sft_in_the_method_alone():
    ours, other = (
        OmegaConf.to_container(compose([f"recipe={r}", "run.dir=x"]))
        for r in ("onpolicy_sft", "grpo")
    )
    for config in (ours, other):
        del config["recipe"], config["trainer"], config["train"]["normalizer"]
    assert ours == other


def test_a_baseline_differs_from_poweropd_in_the_reward_and_its_learning_rate():
    """The learning rate of each was chosen in the same way (README)."""
    ours, baseline = (
        OmegaConf.to_container(compose([f"recipe={r}", "run.dir=x"])) for r in ("poweropd", "opd")
    )
    assert baseline["reward"].pop("token") == "log_ratio" and ours["reward"].pop("token") == "power"
    assert ours.pop("recipe") != baseline.pop("recipe")
    assert ours["train"].pop("lr") > baseline["train"].pop("lr")
    assert ours == baseline


@pytest.mark.parametrize(
    "override, message",
    [
        ("reward.alpah=1", "there is no key 'reward.alpah'; did you mean 'reward.alpha'?"),
        ("alpha=1", "there is no key 'alpha'; did you mean 'reward.alpha'?"),
        ("+train.foo=1", "there is no key 'train.foo'"),
        ("recipe=powerop", "recipe=powerop is not known; did you mean 'poweropd'?"),
        ("engine=zero9", "engine=zero9 is not known; did you mean 'zero"),
        (
            "train.steps=many",
            "train.steps: Value 'many' of type 'str' could not be converted to Integer",
        ),
        ("reward.alpha=0", "reward.alpha=0.0 must be above 0"),
        ("reward.alpha=-1", "reward.alpha=-1.0 must be above 0"),
        ("train=3", "'train' is a section, not a value"),
        ("objective=reverse", "objective=reverse is not known; did you mean 'reverse_kl'?"),
        ("reward.terminal_stop=maks", "did you mean 'mask'?"),
        ("rollout.top_k=0", "rollout.top_k=0 must be -1 (off) or 1 or more"),
        ("train.betas=[0.9]", "train.betas=[0.9] must be two numbers"),
        ("eval.samples=2", "eval.samples=2 must be at least eval.k=4"),
        ("engine.offload_params=true", "needs engine.zero_stage=3"),
        ("no equals sign", "is not KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_ranks_than_prompts_is_refused():
    with pytest.raises(ConfigError, match="train.prompts_per_step=3 is less than the 4 ranks"):
        validate(compose(["train.prompts_per_step=3"]), world_size=4)


def test_every_key_of_the_schema_is_read_somewhere():
    """A key nobody reads is a promise nobody keeps. Its name must occur as an attribute outside the
    schema."""
    source = "\n".join(
        path.read_text()
        for folder in ("trainers", "rollouts", "rewards", "scripts", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("schema.py", "compose.py")
    )
    source += (ROOT / "train.py").read_text()
    leaves = {
        key
        for key in schema_keys()
        if not any(other.startswith(key + ".") for other in schema_keys())
    }
    unread = [
        key for key in sorted(leaves) if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", source)
    ]
    assert unread == []


@pytest.mark.parametrize(
    "registry", [TRAINERS, ENGINES, TOKEN_REWARDS, VERIFIERS, DECISION_HEADS], ids=lambda r: r.key
)
def test_every_registered_component_is_where_its_path_says(registry):
    for name in registry:
        assert callable(registry.resolve(name))


def test_a_component_joins_by_dotted_path_and_a_wrong_one_is_named():
    registry = Registry("reward.token", {"power": "math.pi"})
    assert registry.resolve("power") == pytest.approx(3.14159, abs=1e-4)
    assert registry.resolve("math.tau") == pytest.approx(6.28318, abs=1e-4)
    with pytest.raises(
        ConfigError, match="reward.token='powr' is not known; did you mean 'power'?"
    ):
        registry.resolve("powr")
    with pytest.raises(ConfigError, match="cannot be imported"):
        registry.resolve("no_such_module.thing")


def test_a_config_as_a_dictionary_as_yaml_and_flat():
    config = compose(["rollout.max_new_tokens_schedule=[[5,60]]"])
    as_dict, flat = to_dict(config), flatten(config)
    assert as_dict["train"]["steps"] == flat["train.steps"] == config.train.steps
    assert as_dict["rollout"]["max_new_tokens_schedule"] == [[5, 60]]
    assert flat["rollout.max_new_tokens_schedule"] == [[5, 60]]
    assert to_yaml(config).startswith("recipe: poweropd\n")
    assert flatten(yaml.safe_load(to_yaml(config))) == flat


def test_a_replaced_value_is_checked_and_leaves_the_config_alone():
    config = compose([])
    changed = replaced(config, {"run.dir": "elsewhere", "train.betas": (0.5, 0.6)})
    assert changed.run.dir == "elsewhere" and list(changed.train.betas) == [0.5, 0.6]
    assert config.run.dir != "elsewhere" and list(config.train.betas) == [0.9, 0.999]
    for key, value, message in (
        ("train.stepz", 1, "there is no key 'train.stepz'; did you mean 'train.steps'?"),
        ("train.steps", "many", "train.steps: Value 'many'"),
        ("reward.alpha", 0, "reward.alpha=0.0 must be above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            replaced(config, {key: value})
        assert str(caught.value).startswith(message)
