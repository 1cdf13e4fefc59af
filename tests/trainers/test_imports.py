"""Dependencies point one way, and the heavy ones load where they are used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "kernels": set(),
    "recipes": set(),
    "rewards": {"recipes", "kernels"},
    "rollouts": {"recipes", "rewards", "kernels"},
    "trainers": {"recipes", "rewards", "rollouts", "kernels"},
}
OURS = {*ALLOWED, "scripts"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top == package or top not in OURS - ALLOWED[package], (
                    f"{path.name} imports {name}"
                )


def test_the_package_imports_without_the_engines(run_command):
    blocked = "; ".join(
        f"sys.modules['{name}'] = None" for name in ("vllm", "deepspeed", "wandb", "triton")
    )
    done = run_command(
        "-c", f"import sys; {blocked}; import trainers.loop, trainers.prepare, kernels"
    )
    assert done.returncode == 0, done.stderr[-1000:]
