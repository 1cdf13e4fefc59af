"""What `--help` prints."""

import re

import pytest

from recipes.compose import compose, flatten, recipes
from recipes.errors import ConfigError
from recipes.help import command_help, help_text


def listed(text: str) -> list[str]:
    return re.findall(r"^  ([a-z_.]+)(?:=.*|  \[.*)$", text, re.M)


@pytest.mark.parametrize("recipe", recipes())
def test_it_lists_exactly_the_keys_that_the_run_reads(recipe):
    text = help_text([f"recipe={recipe}"])
    keys = listed(text)
    assert sorted(keys) == sorted(flatten(compose([f"recipe={recipe}"])))
    assert f"Keys of recipe={recipe}" in text


def test_it_shows_the_recipes_values_with_bounds_and_meaning():
    text = help_text(["recipe=opd", "train.steps=7"])
    assert "  train.steps=7  [whole number: 0 or more]\n      Number of steps.\n" in text
    assert (
        "  reward.token=log_ratio\n      [text: power, log_ratio, clip, tanh, zscore, sign;" in text
    )
    assert "  opd_clip             Baseline of the PowerOPD paper" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_wrong_override_is_an_error_there_too():
    with pytest.raises(ConfigError, match=r"did you mean 'reward\.alpha'"):
        help_text(["reward.alpah=1"])


def test_the_help_of_a_command():
    text = command_help(
        "Measures.\n\n    python -m scripts.measure\n",
        {"model": "model.path", "out": "File that receives the figures."},
    )
    assert text.startswith(
        "Measures.\n\n    python -m scripts.measure\n\nKeys\n\n  model  (model.path)  ["
    )
    assert text.endswith("  out\n      File that receives the figures.")
    assert "stories-student" not in text.split("Keys")[1].splitlines()[2]
