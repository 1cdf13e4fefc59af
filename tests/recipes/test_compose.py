"""The config: recipes compose, and every mistake ends in one line that names the key."""

import dataclasses
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes import foreign_names
from recipes.components import DECISION_HEADS, ENGINES, TOKEN_REWARDS, TRAINERS, VERIFIERS
from recipes.compose import (
    compose,
    flatten,
    recipe_values,
    recipes,
    schema_keys,
    to_dict,
    to_yaml,
    validate,
)
from recipes.errors import ConfigError
from recipes.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("recipe", recipes())
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


def differences(*names: str) -> dict[str, tuple]:
    """The keys in which two recipes differ, and what each has."""
    first, second = (flatten(compose([f"recipe={name}", "run.dir=x"])) for name in names)
    return {
        key: (first.get(key), second.get(key))
        for key in first | second
        if first.get(key) != second.get(key) and key != "recipe"
    }


def test_grpo_differs_from_on_policy_sft_in_the_method_alone():
    keys = differences("onpolicy_sft", "grpo").keys()
    method = {"trainer", "train.normalizer", "allow_biased_sampling", "keep_above"}
    assert {key for key in keys if not key.startswith("grpo.")} == method


def test_a_baseline_differs_from_poweropd_in_the_reward_and_its_learning_rate():
    """The learning rate of each was chosen in the same way (README)."""
    found = differences("poweropd", "opd")
    assert found.pop("reward.token") == ("power", "log_ratio")
    ours, baseline = found.pop("train.lr")
    assert ours > baseline and not found


@pytest.mark.parametrize(
    "baseline, key",
    [
        ("opd_clip", "reward.token"),
        ("opd_tanh", "reward.token"),
        ("opd_zscore", "reward.token"),
        ("opd_forward_kl", "objective"),
        ("opd_jsd", "objective"),
        ("opd_reverse_kl", "objective"),
        ("opd_topk", "objective"),
    ],
)
def test_a_baseline_differs_from_vanilla_distillation_in_one_key(baseline, key):
    assert differences("opd", baseline).keys() == {key}


@pytest.mark.parametrize(
    "override, message",
    [
        ("reward.alpah=1", "there is no key 'reward.alpah'; did you mean 'reward.alpha'?"),
        ("alpha=1", "there is no key 'alpha'; did you mean 'reward.alpha'?"),
        ("rollout.foo=1", "there is no key 'rollout.foo'"),
        ("+train.foo=1", "'+train.foo=1': a key is neither added nor deleted"),
        ("~train.steps", "'~train.steps': a key is neither added nor deleted"),
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
        ("train.betas=[0.9]", "train.betas=[0.9] must be a pair of numbers"),
        (
            "train.betas=[0.9,1]",
            "train.betas=[0.9,1.0] must be numbers, each 0 or more and below 1",
        ),
        (
            "rollout.max_new_tokens_schedule=[[5]]",
            "rollout.max_new_tokens_schedule=[[5]] must be a list of pairs of whole numbers",
        ),
        (
            "rollout.max_new_tokens_schedule=[[5,60],[2,40]]",
            "must be pairs in the order of their steps",
        ),
        ("reward.token=powr", "reward.token=powr is not known; did you mean 'power'?"),
        ("trainer=opdd", "trainer='opdd' is not known; did you mean 'opd'?"),
        (
            "rollout.engine=streaming",
            "rollout.engine=streaming cannot sample without a streaming.layout; use "
            "rollout.engine=vllm or hf",
        ),
        (
            "train.normalizer=window_token_mean",
            "train.normalizer=window_token_mean is now token_mean",
        ),
        ("eval.samples=2", "eval.samples=2 must be at least eval.k=4"),
        ("engine.offload_params=true", "needs engine.zero_stage=3"),
        ("no equals sign", "is not KEY=VALUE"),
        ("train.lr=(3", "train.lr=(3 must be a number"),
        ("train.lr=1,2", "train.lr=1,2 has several values; a run takes one"),
        ("train.betas=0.9,0.95", "must be a pair of numbers, in brackets: train.betas=[0.9,0.95]"),
        ("rollout.stop_ids=7", "be a list of whole numbers, in brackets: rollout.stop_ids=[7]"),
        ("run.dir=null", "run.dir=null must be a text; leave the key out for its default"),
        ("data.path=a${b", "data.path: no viable alternative at input '${b'; ${NAME} stands for"),
        ("data.path=a${b}", "Interpolation key 'b' not found; ${NAME} stands for the value of"),
        ("train.learning_rate=1", "there is no key 'train.learning_rate'; TRL's learning_rate is"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TEXTS = [
    "~/x",
    "~/x (1)/ä",
    "日本/データ",
    "a b, c = [d] {e}",
    "s3://x/y?z=1&a=b#c",
    "C:\\x\\y",
    'Reason in \\boxed{}, then\nanswer: `x` < y; it\'s 50 % "done"!',
    " a space before and after ",
    "'a' or 'b'",
    "choice(a,b)",
    "1e5",
    "007",
    "1_000",
    "true",
    "NULL",
    "-1",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_key_of_text_takes_its_value_as_it_stands(text):
    keys = ("model.path", "data.path", "eval.path", "data.suffix", "run.dir", "resume")
    config = compose([f"{key}={text}" for key in keys])
    values, saved = flatten(config), flatten(yaml.safe_load(to_yaml(config)))
    for key in keys:
        assert values[key] == saved[key] == text


@pytest.mark.parametrize(
    "written, meant",
    [
        ("\"a, b = 'c'\"", "a, b = 'c'"),
        ("'null'", "null"),
        ("'it\\'s'", "it's"),
        ("null", None),
        ("${recipe} (${train.steps})", "poweropd (200)"),
    ],
)
def test_quotes_null_and_references_mean_in_a_text_what_they_mean_to_hydra(written, meant):
    assert compose(["train.steps=200", f"data.suffix={written}"]).data.suffix == meant


def test_keys_that_are_no_text_keep_hydras_grammar_and_the_last_of_two_counts():
    overrides = ["recipe=proactivellm", "proactive.curve=[batch, wait_k]", "train.betas=[0.9,0.95]"]
    config = compose([*overrides, "data.limit=null", "model.path=x", "model.path=y", "seed=1_000"])
    assert config.proactive.curve == ("batch", "wait_k") and config.train.betas == (0.9, 0.95)
    assert config.data.limit is None and config.model.path == "y" and config.seed == 1000


@pytest.mark.parametrize(
    "key, hint",
    [
        ("learning_rate", "TRL's learning_rate is train.lr here"),
        ("actor_rollout_ref.actor.optim.lr", "verl's actor.optim.lr is train.lr here"),
        ("data.train_batch_size", "verl's data.train_batch_size is train.prompts_per_step here"),
        ("train.num_iterations", "TRL's num_iterations has no counterpart here: Each sample is"),
        ("adam_beta2", "TRL's adam_beta2 is train.betas here"),
        # A name that is ours too, in another section, is ours first.
        ("path", "did you mean 'data.path'?"),
    ],
)
def test_the_name_of_another_project_gets_ours(key, hint):
    with pytest.raises(ConfigError) as caught:
        compose([f"{key}=1"])
    assert f"there is no key '{key}'; {hint}" in str(caught.value)


def test_the_page_of_other_names_leads_to_keys_that_exist():
    """The hints are read from the page."""
    keys = {key for row in foreign_names.rows() for key in row.keys if "." in key}
    assert len(foreign_names.rows()) > 120 and len(keys) > 40
    assert keys <= schema_keys() | {"torchrun --nproc_per_node"}


def test_more_ranks_than_prompts_is_refused():
    with pytest.raises(ConfigError, match=r"train\.prompts_per_step=3 is less than the 4 ranks"):
        validate(compose(["train.prompts_per_step=3"]), world_size=4)


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
        ConfigError, match=r"reward\.token='powr' is not known; did you mean 'power'\?"
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
    assert config.rollout.max_new_tokens_schedule == ((5, 60),)
    assert to_yaml(config).startswith("recipe: poweropd\n")
    assert flatten(yaml.safe_load(to_yaml(config))) == flat


def test_a_config_is_frozen():
    config = compose([])
    for section, key in ((config, "seed"), (config.train, "steps"), (config.reward, "token")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, key, 1)
    for value in flatten(config):
        assert not isinstance(operator.attrgetter(value)(config), (list, dict))


def test_a_recipe_that_sets_a_key_of_another_method_is_refused():
    with pytest.raises(ConfigError) as caught:
        compose(["recipe=poweropd", "trainer=sft"])
    assert str(caught.value) == (
        "recipe=poweropd sets reward.token: reward.token is not read by trainer=sft; "
        "recipe=poweropd reads it"
    )


def test_a_recipes_values_are_those_of_the_recipes_it_is_based_on_too():
    values = recipe_values("opd_clip")
    assert (values["recipe"], values["trainer"], values["reward.token"]) == (
        "opd_clip",
        "opd",
        "clip",
    )
    assert values["train.lr"] == recipe_values("opd")["train.lr"]


def test_composing_imports_no_heavy_package():
    code = """
import sys
from recipes.compose import compose, recipes
from recipes.help import help_text
for recipe in recipes():
    compose([f"recipe={recipe}"])
help_text([])
heavy = {"torch", "transformers", "vllm", "deepspeed", "numpy", "trainers", "rollouts"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
