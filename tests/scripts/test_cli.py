"""What the commands share: an error's line is the last one, under torchrun too; the next steps are
real commands."""

import shlex

from recipes.compose import compose
from scripts.cli import next_steps


def test_an_error_is_the_last_line_under_torchrun(run_command):
    done = run_command(
        "train.py", "recipe=poweropd", "model.path=stories-studnet", ranks=1, timeout=100
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
