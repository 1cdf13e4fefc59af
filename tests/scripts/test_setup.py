"""Set-up on a machine where something is wrong: one clear line, and status 1."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    base = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL_ENV", "PYTHON"))}
    base |= {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "ONSTREAM_VARIANT": "cpu", "PYTHON": sys.executable}
    return subprocess.run(["bash", "scripts/quickstart.sh"], cwd=checkout, env=base | environment, capture_output=True,
                          text=True, timeout=200)


def one_line(done) -> str:
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_a_wrong_python(checkout):
    program(checkout, "old-python", 'if [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi')
    assert "Python 3.11 to 3.13 is needed" in one_line(quickstart(checkout, PYTHON="old-python"))


def test_no_disk(checkout):
    program(checkout, "df", "echo Filesystem 1024-blocks Used Available; echo /dev/x 100 99 1048576 99% /")
    assert "10 GiB of disk are needed for the packages, 1 GiB are free" in one_line(quickstart(checkout))


def test_no_compiler(checkout):
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "dirname", "cat", "cksum", "nvidia-smi", "awk", "df", "grep", "pwd"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    assert "g++ is needed" in one_line(quickstart(checkout, PATH=str(tools)))


def test_a_failing_package_install(checkout):
    message = one_line(quickstart(checkout, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull))
    assert "installing packages failed: ERROR" in message and ".venv.log" in message


def test_an_unknown_variant(checkout):
    assert "ONSTREAM_VARIANT=tpu must be cpu or gpu" in one_line(quickstart(checkout, ONSTREAM_VARIANT="tpu"))


def test_a_second_start_installs_nothing(checkout):
    python = checkout / ".venv" / "bin"
    python.mkdir(parents=True)
    (python / "activate").write_text(f"export PATH={python}:$PATH\n")
    stamp = subprocess.run(["sh", "-c", "cat pyproject.toml scripts/setup.sh | cksum"], cwd=checkout,
                           capture_output=True, text=True).stdout.strip()
    (checkout / ".venv" / "onstream.stamp").write_text(f"cpu {stamp}\n")
    program(checkout, "torchrun", 'echo "ran torchrun $*"')
    done = quickstart(checkout)
    assert done.returncode == 0 and "setting up" not in done.stdout
    assert done.stdout.startswith("ran torchrun --standalone --nproc_per_node=1 train.py recipe=poweropd")
