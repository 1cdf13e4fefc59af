"""Starts the Triton tests in a process with the interpreter on, and proves that they can fail: with
one of three classic mistakes written into a copy of the kernels, they do."""

import os
import re
import shutil
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
        "test_logits",
    ),
    "target_off_by_one_split": (
        "triton_rows.py",
        "local = tl.load(ids_ptr + base + k) - v0\n        inside",
        "local = tl.load(ids_ptr + base + k) - v0 + N\n        inside",
        "test_head",
    ),
    "32_bit_offsets": (
        "triton_rows.py",
        "row = i.to(tl.int64)\n    if HAS_ROWS:\n        row = tl.load(rows_ptr + i)\n",
        "row = i\n    if HAS_ROWS:\n        row = tl.load(rows_ptr + i).to(tl.int32)\n",
        "test_offsets_beyond_32_bits",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_noticed(tmp_path, name):
    file, right, wrong, test = MUTATIONS[name]
    shutil.copytree(
        ROOT / "kernels",
        tmp_path / "kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    source = (tmp_path / "kernels" / file).read_text()
    assert source.count(right) == 1
    select = f"{test} or ({test} and 129)"
    clean = run(tmp_path, str(HERE / "triton_in_interpreter.py"), "-x", "-k", select)
    assert clean.returncode == 0, clean.stdout[-3000:]
    (tmp_path / "kernels" / file).write_text(source.replace(right, wrong))
    broken = run(tmp_path, str(HERE / "triton_in_interpreter.py"), "-x", "-k", select)
    assert broken.returncode != 0 and "ModuleNotFound" not in broken.stdout
