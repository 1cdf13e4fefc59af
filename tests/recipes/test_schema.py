"""The schema: each method's keys, their bounds, and that somebody reads them."""

import re
from pathlib import Path

import pytest

from recipes.components import TRAINERS
from recipes.compose import compose, flatten, readers, schema_keys
from recipes.errors import ConfigError
from recipes.schema import GROUPS, SECTIONS, Config, groups_of, keys_of, run_schema
from recipes.schema.keys import Key

ROOT = Path(__file__).resolve().parents[2]
RECIPE_OF = {
    "opd": "poweropd",
    "grpo": "grpo",
    "hrpo": "adasr",
    "sft": "sft",
    "offline_distillation": "distill",
    "onpolicy_sft": "onpolicy_sft",
    "streaming_sft": "streaming_sft",
    "proactivellm": "proactivellm",
}
# Every key of every method, and the recipe that it is tried with.
KEYS = {
    key.name: (recipe, key)
    for trainer, recipe in RECIPE_OF.items()
    for key in keys_of(run_schema(groups_of(trainer))).values()
}


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_trainer_has_its_sections():
    assert SECTIONS.keys() == TRAINERS.keys() == RECIPE_OF.keys()
    assert {group for groups in SECTIONS.values() for group in groups} == GROUPS.keys()


def test_a_config_has_the_common_keys_and_those_of_its_method():
    common, ours = keys_of(Config).keys(), flatten(compose(["recipe=adasr"])).keys()
    assert {key.partition(".")[0] for key in ours - common} == {
        "streaming",
        "grpo",
        "hrpo",
        "reward",
    }
    assert common <= ours
    assert flatten(compose(["recipe=sft"])).keys() == common


@pytest.mark.parametrize("trainer, recipe", RECIPE_OF.items())
def test_a_key_of_another_method_is_refused_with_the_recipes_that_read_it(trainer, recipe):
    own = keys_of(run_schema(groups_of(trainer)))
    foreign = KEYS.keys() - own.keys()
    assert foreign
    for key in foreign:
        said = refused(f"recipe={recipe}", f"{key}=1")
        assert said.startswith(f"{key} is not read by recipe={recipe}; ")
        for other in readers(key):
            assert f"recipe={other}" in said


def test_the_refusal_of_a_foreign_key_word_for_word():
    assert refused("hrpo.local_weight=1") == (
        "hrpo.local_weight is not read by recipe=poweropd; recipe=adasr reads it"
    )
    assert refused("recipe=sft", "streaming.layout=grouped") == (
        "streaming.layout is not read by recipe=sft; recipe=adasr, recipe=proactivellm and "
        "recipe=streaming_sft read it"
    )
    assert refused("recipe=adasr", "grpo.gamma=1") == (
        "grpo.gamma is not read by recipe=adasr; recipe=grpo reads it"
    )


def bad_values(key: Key) -> list[object]:
    """Values that are just outside a key's bounds."""
    bounds = key.bounds
    if bounds.component is not None or bounds.choices:
        return ["nothing_of_the_kind" if "text" in key.type else 99]
    return [
        bad
        for bound, bad in (
            (bounds.above, bounds.above),
            (bounds.below, bounds.below),
            (bounds.at_least, (bounds.at_least or 0) - 1),
            (bounds.at_most, (bounds.at_most or 0) + 1),
        )
        if bound is not None and bad != bounds.off
    ]


BAD = [(recipe, key, bad) for recipe, key in KEYS.values() for bad in bad_values(key)]


@pytest.mark.parametrize("recipe, key, bad", BAD, ids=[f"{k.name}={bad}" for _, k, bad in BAD])
def test_a_value_outside_its_bounds_is_one_line_that_names_the_key(recipe, key, bad):
    value = f"[{bad},{bad}]" if "pair" in key.type else bad
    if key.type.startswith("list"):
        value = f"[{value}]"
    # A teacher of several has no default path.
    path = ["teachers.NAME.path=x"] if key.name.startswith("teachers.NAME.") else []
    said = refused(f"recipe={recipe}", *path, f"{key.name}={value}")
    assert said.startswith(f"{key.name}=")
    assert "must be" in said or "is not known" in said


def test_every_key_with_bounds_has_been_tried():
    assert len({key.name for _, key, _ in BAD}) > 70


@pytest.mark.parametrize("key", [key for _, key in KEYS.values()], ids=lambda key: key.name)
def test_a_key_says_what_it_is_and_its_default_is_allowed(key):
    assert key.meaning.endswith(".") and (key.meaning[0].isupper() or key.meaning[1:2] in " :")
    if key.default != "???":
        key.check(key.default)


def test_every_key_of_the_schema_is_read_somewhere():
    """A key nobody reads is a promise nobody keeps. Its name must occur as an attribute outside the
    schema."""
    source = "\n".join(
        path.read_text()
        for folder in ("trainers", "rollouts", "rewards", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    )
    source += (ROOT / "train.py").read_text()
    names = {key.rpartition(".")[2] for key in KEYS}
    assert [name for name in sorted(names) if not re.search(rf"\.{name}\b", source)] == []


def test_all_keys_together_are_those_of_the_methods():
    joined = keys_of(run_schema(tuple(GROUPS)))
    assert joined.keys() == KEYS.keys() <= schema_keys()
    layouts = joined["streaming.layout"].bounds.choices
    assert layouts == (None, "grouped", "batch", "interleaved", "scheduled")


@pytest.fixture
def own_trainer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, body: str) -> str:
        (tmp_path / f"{name}.py").write_text(f"class Mine:\n    {body}\n")
        return f"trainer={name}.Mine"

    return make


def test_a_trainer_from_outside_reads_the_sections_that_it_names(own_trainer):
    chosen = own_trainer("mine_with_sections", 'sections = ("distillation", "grpo")')
    config = compose(["recipe=poweropd", chosen, "grpo.gamma=2", "reward.alpha=3"])
    assert (config.grpo.gamma, config.reward.alpha) == (2, 3)
    assert refused("recipe=poweropd", chosen, "hrpo.local_weight=1") == (
        "hrpo.local_weight is not read by trainer=mine_with_sections.Mine; recipe=adasr reads it"
    )


def test_a_trainer_from_outside_without_sections_reads_all(own_trainer):
    chosen = own_trainer("mine_without", "pass")
    config = compose(["recipe=poweropd", chosen, "hrpo.local_weight=1", "rollout.fixed_steps=2"])
    assert (config.hrpo.local_weight, config.rollout.fixed_steps) == (1, 2)
    assert config.streaming.layout is None and config.model.encoder is None


def test_a_trainer_from_outside_with_an_unknown_section(own_trainer):
    chosen = own_trainer("mine_with_unknown", 'sections = ("distilation",)')
    assert refused(chosen) == (
        "trainer=mine_with_unknown.Mine: its `sections` has 'distilation', which is not known; did "
        "you mean 'distillation'?"
    )
