"""What the commands share: arguments, help, errors of one line, and the next steps after a run."""

import ast
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from recipes.compose import compose, schema_keys
from recipes.errors import ConfigError
from scripts import new_model, tiny_models
from scripts.cli import key_values, next_steps, run_command

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SCRIPTS_WITH_HELP = (
    "compare_runs",
    "curves",
    "divergence",
    "evaluate",
    "inspect",
    "interpret",
    "new_model",
    "remove_layers",
    "split_qwen2_audio",
    "stream",
    "tiny_models",
)
# Every arrow from a script to another, but those to cli.py.
ARROWS = {("curves", "evaluate"), ("tiny_models", "new_model")}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", SCRIPTS_WITH_HELP)
def test_help_names_every_key(name, flag, capsys):
    script = importlib.import_module(f"scripts.{name}")
    assert script.main(["nothing", flag]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first_line = script.__doc__.splitlines()[0]
    assert printed.out.startswith(first_line)
    assert f"python -m scripts.{name}" in printed.out
    for short, key in getattr(script, "SHORT_KEYS", {}).items():
        assert re.search(rf"^  {short}  \({key}[=)]", printed.out, re.M)
    for key, meaning in getattr(script, "OWN_KEYS", {}).items():
        assert f"\n  {key}\n" in printed.out
        assert " ".join(meaning.split()) in " ".join(printed.out.split())


def test_help_names_every_option_of_the_embedded_models(capsys):
    assert tiny_models.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--remake", "--out", "--steps", "--vocab-size"))


def test_help_states_the_real_defaults():
    sizes = {field.name: field.default for field in fields(new_model.Sizes)}
    for key, default in sizes.items():
        assert new_model.OWN_KEYS[key].endswith(f"default: {default}.")


def test_the_reports_help_has_its_commands(capsys):
    from scripts.report.__main__ import main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python -m scripts.report RUN_DIR" in shown and "  RUN_DIR …\n" in shown


@pytest.mark.parametrize("name", SCRIPTS_WITH_HELP)
def test_short_keys_stand_for_keys_of_the_config(name):
    script = importlib.import_module(f"scripts.{name}")
    assert set(getattr(script, "SHORT_KEYS", {}).values()) <= schema_keys()


@pytest.mark.slow
def test_help_loads_no_heavy_package(run_command):
    """One process for all scripts; Hydra and torch take seconds to load."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    assert importlib.import_module(f'scripts.{name}').main(['--help']) == 0\n"
        "print('loaded', *sys.modules)\n"
    )
    done = run_command("-c", program, *SCRIPTS_WITH_HELP)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split("loaded ")[1].split()
    assert not {"torch", "transformers", "hydra"} & set(loaded)


def test_scripts_import_downwards_only():
    found = set()
    for path in SCRIPTS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("scripts"):
                found.add((path.stem, module.removeprefix("scripts.")))
    to_cli = {arrow for arrow in found if arrow[1] == "cli"}
    assert {name for name, _ in to_cli} >= set(SCRIPTS_WITH_HELP)
    # tests/trainers/test_imports.py looks for circles; this says which arrows there are.
    own = {arrow for arrow in found - to_cli if arrow[0] in {"cli", *SCRIPTS_WITH_HELP}}
    assert own == ARROWS


def test_key_values():
    short_keys = {"model": "model.path"}
    arguments = ["model=a=b", "seed=1", "data.suffix="]
    values = key_values(arguments, short_keys, "scripts.x", required=("model",))
    assert values == {"model.path": "a=b", "seed": "1", "data.suffix": ""}
    # The long form of a required key counts.
    assert key_values(["model.path=c"], short_keys, "scripts.x", required=("model",))
    with pytest.raises(ConfigError, match="'fast' is not KEY=VALUE; see python -m scripts.x"):
        key_values(["fast"], short_keys, "scripts.x")
    with pytest.raises(ConfigError, match="model=… is missing: python -m scripts.x model=DIR"):
        key_values([], short_keys, "scripts.x", "model=DIR", ("model",))


def test_an_error_of_the_user_is_one_line_and_another_is_not_hidden(capsys):
    def fail(arguments):
        raise ConfigError("seed=x is no number")

    assert run_command(fail, [], "help", {}) == 1
    assert capsys.readouterr().err == "error: seed=x is no number\n"
    with pytest.raises(ZeroDivisionError):
        run_command(lambda arguments: 1 / 0, [], "help", {})


def test_an_error_is_the_last_line_under_torchrun(run_command):
    done = run_command(
        "train.py",
        *("recipe=poweropd", "model.path=stories-studnet"),
        ranks=1,
        timeout=100,
        new_process=True,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert any("ChildFailedError" in line for line in lines)  # torchrun's own report came before
    assert (
        lines[-1]
        == "error: model.path=stories-studnet: no such folder; did you mean 'stories-student'?"
    )


def test_the_next_steps_are_commands_that_compose(tmp_path):
    config = compose(["recipe=poweropd"])
    (tmp_path / "a run" / "checkpoints" / f"step_{config.train.steps}" / "model").mkdir(
        parents=True
    )
    lines = [line.strip() for line in next_steps(config, tmp_path / "a run").splitlines()]
    runs = [shlex.split(line)[2:] for line in lines if "train.py" in line]
    assert len(runs) == 2
    for overrides in runs:
        compose(overrides)
    (measure,) = (shlex.split(line) for line in lines if "scripts.evaluate" in line)
    assert f"model={tmp_path}/a run/checkpoints/step_{config.train.steps}/model" in measure


def test_help_prints_the_keys_that_a_run_reads(capsys):
    import train

    assert train.main(["recipe=adasr", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "hrpo.local_weight=0.5" in shown and "reward.alpha" not in shown


def test_the_key_of_another_method_is_one_line(capsys):
    import train

    assert train.main(["recipe=poweropd", "hrpo.local_weight=1"]) == 1
    error = capsys.readouterr().err
    assert (
        error == "error: hrpo.local_weight is not read by recipe=poweropd; recipe=adasr reads it\n"
    )
