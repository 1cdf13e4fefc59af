"""Starts the Triton tests in a process with the interpreter on, and proves that they can fail: with
one of three classic mistakes written into a copy of the kernels, they do."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "kernels"


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--rootdir",
        str(root),
        "-c",
        str(ROOT / "setup.cfg"),
        "-o",
        f"pythonpath={root}",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_triton_equals_its_twins():
    done = run(ROOT, str(HERE / "triton_in_interpreter.py"), str(HERE / "test_kernels_checks.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 150
    assert "skipped" not in done.stdout


MUTATIONS = {
    "no_tail_mask": (
        "triton_rows.py",
        'z = tl.where(inside, z, float("-inf"))',
        "z = z",
        "(test_logits and 129 and dtype0)",
    ),
    "target_off_by_one_split": (
        "triton_rows.py",
        "local = tl.load(ids_ptr + base + k) - v0\n        inside",
        "local = tl.load(ids_ptr + base + k) - v0 + N\n        inside",
        "(test_head and 1003 and dtype0)",
    ),
    "32_bit_offsets": (
        "triton_rows.py",
        "row = i.to(tl.int64)\n    if HAS_ROWS:\n        row = tl.load(rows_ptr + i)\n",
        "row = i\n    if HAS_ROWS:\n        row = tl.load(rows_ptr + i).to(tl.int32)\n",
        "test_offsets_beyond_32_bits",
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the kernels, with which the tests of `MUTATIONS` pass."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=ignored)
    clean = run_copy(root, " or ".join(choice for *_, choice in MUTATIONS.values()))
    assert clean.returncode == 0, clean.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", clean.stdout).group(1)) == len(MUTATIONS)
    return root


def run_copy(root: Path, choice: str) -> subprocess.CompletedProcess:
    return run(root, str(HERE / "triton_in_interpreter.py"), "-x", "-k", choice)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_noticed(copied, tmp_path, name):
    file, right, wrong, choice = MUTATIONS[name]
    shutil.copytree(copied / "kernels", tmp_path / "kernels")
    source = (tmp_path / "kernels" / file).read_text()
    assert source.count(right) == 1
    (tmp_path / "kernels" / file).write_text(source.replace(right, wrong))
    broken = run_copy(tmp_path, choice)
    # A test fails, or reads memory that is not there; pytest itself has other statuses.
    assert broken.returncode in (1, -signal.SIGSEGV) and "ModuleNotFound" not in broken.stdout
