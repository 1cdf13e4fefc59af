"""Dependencies point one way, inside packages too, and the heavy ones load where they are used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Room -> the rooms it may import. A room is the longest of these prefixes of a module's name.
ALLOWED = {
    "recipes": set(),
    "kernels": set(),
    "rewards.metrics": {"recipes"},
    "rewards": {"recipes", "kernels", "rewards.metrics"},
    "rollouts": {"recipes"},
    "rollouts.data": {"recipes", "rewards", "rollouts"},
    "rollouts.engines": {"recipes", "rollouts"},
    "rollouts.streaming": {"recipes", "rollouts", "rollouts.data", "rollouts.engines"},
    "rollouts.simultaneous": {
        "recipes",
        "rollouts",
        "rollouts.data",
        "rollouts.engines",
        "rollouts.streaming",
    },
    "trainers.core": {"recipes", "kernels", "rollouts", "rollouts.engines"},
    "trainers.modes": {
        "recipes",
        "rewards",
        "rewards.metrics",
        "rollouts",
        "rollouts.data",
        "rollouts.engines",
        "rollouts.streaming",
        "rollouts.simultaneous",
        "trainers.core",
    },
}
ALLOWED["trainers"] = set(ALLOWED)
ALLOWED["scripts"] = {*ALLOWED, "trainers"}
# Modules whose work is a method's or a mode's; the others name none.
METHODS = {"opd", "grpo", "hrpo", "sft", "onpolicy_sft", "streaming_sft", "proactivellm"}
METHODS |= {"offline_distillation"}


def room(module: str) -> str | None:
    """The room of a module of ours; None for a library."""
    prefixes = [name for name in ALLOWED if module == name or module.startswith(name + ".")]
    return max(prefixes, key=len, default=None)


def modules() -> dict[str, Path]:
    """Our modules by name."""
    found = {}
    for package in {name.split(".")[0] for name in ALLOWED}:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; those for type checkers alone are left
    out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = whole & MODULES.keys()
            names |= ours or {node.module}
    return names


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    here = room(name)
    for imported in imports(MODULES[name]):
        there = room(imported)
        if there is not None and there != here:
            assert there in ALLOWED[here], f"{name} imports {imported}"


def test_there_is_no_circle():
    arrows = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}
    finished, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in finished:
            return
        path.append(name)
        for other in sorted(arrows[name] - {name}):
            visit(other)
        path.pop()
        finished.add(name)

    for name in sorted(arrows):
        visit(name)


@pytest.mark.parametrize(
    "name", [n for n in sorted(MODULES) if n.startswith(("trainers.core.", "kernels."))]
)
def test_the_core_imports_no_method_and_no_mode(name):
    for imported in imports(MODULES[name]):
        assert not imported.startswith("trainers.modes")
        assert imported.removeprefix("trainers.") not in METHODS


@pytest.mark.slow
def test_the_package_imports_without_the_engines(run_command):
    names = ("vllm", "deepspeed", "wandb", "triton")
    blocked = "; ".join(f"sys.modules['{name}'] = None" for name in names)
    done = run_command(
        "-c", f"import sys; {blocked}; import trainers.loop, trainers.prepare, kernels"
    )
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.slow
def test_a_poweropd_run_loads_no_other_method_and_no_bleu(run_command, overrides):
    program = (
        "import sys, train; status = train.main(sys.argv[1:]); "
        "print('loaded', *sorted(sys.modules)); sys.exit(status)"
    )
    done = run_command("-c", program, *overrides(dry_run="true"))
    assert done.returncode == 0, done.stderr[-1000:]
    loaded = done.stdout.split("loaded ")[1].split()
    assert "trainers.opd" in loaded
    unwanted = {"sacrebleu", "trainers.grpo", "trainers.modes.streaming", "rollouts.simultaneous"}
    assert not unwanted & set(loaded)
