"""The README's two examples, taken from the README itself, run from outside the repository."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> str:
    return re.search(rf"```python\n# {name}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def test_the_readmes_reward_and_trainer_run(overrides, run_command, tmp_path, monkeypatch):
    for name in ("my_rewards.py", "my_trainer.py"):
        assert len(example(name).splitlines()) <= 20
        (tmp_path / name).write_text(example(name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for index, change in enumerate(
        ("reward.token=my_rewards.Margin", "trainer=my_trainer.RejectionSampling")
    ):
        done = run_command(
            "train.py",
            *overrides(run__dir=tmp_path / str(index), eval__every=-1),
            change,
            "rollout.engine=hf",
            "rollout.samples_per_prompt=2",
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "step 2/2" in done.stdout
