"""benchmarks/gpu.sh in tiny on the CPU: every stage runs, and one that fails ends nothing."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import stages
from benchmarks.gpu.stages import Job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(tmp_path):
    return Job("cpu", True, 60, tmp_path, dict(os.environ))


def test_every_stage_runs_in_tiny_on_a_cpu(environment, tmp_path):
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--out", str(out)],
        cwd=ROOT,
        env=environment() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(out.read_text())
    assert done.returncode == 0, json.dumps(found, indent=1)[-4000:] + done.stderr
    assert found["device"] and found["versions"]["torch"] and found["seconds"] > 0
    kernels, training = (found["stages"][name] for name in ("kernels", "training"))
    assert found["stages"]["attention_tests"]["counts"] == {"passed": 9}
    assert found["stages"]["triton_tests"]["counts"] == {"skipped": 1}
    assert {row["provider"] for row in kernels["rows"]} >= {"ours", "torch"}
    attention = found["stages"]["attention"]["rows"]
    assert {row["kernel"] for row in attention} == {"each", "sdpa", "eager"}
    rows = {row["method"]: row for row in training["rows"]}
    assert list(rows) == list(stages.METHODS)
    for row in rows.values():
        assert row["tokens_per_second"] > 0 and all(norm > 0 for norm in row["gradient_norms"])
        assert bool(row["attention"]) == (row["method"] != "power_sdpa")
    assert rows["profile"]["operators"][0]["cpu_ms"] > 0


def test_a_stage_that_fails_ends_nothing(job):
    def broken(job):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = gpu.attempt(broken, job)
    assert found["status"] == "failed" and "illegal memory access" in found["reason"]
    late = Job(job.device, job.quick, 1.0, job.work, job.environment)
    assert gpu.attempt(broken, late)["status"] == "skipped"


def test_a_process_that_dies_is_one_methods_failure(job):
    rows = stages.train(job, ("no_method", "neither"), steps=1)
    assert [row["method"] for row in rows] == ["no_method", "neither"]
    assert all("its process ended" in row["reason"] for row in rows)


def test_what_a_bench_has_written_outlives_its_time(job, tmp_path):
    short, out = replace(job, seconds=1.0), tmp_path / "rows"
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('1'); time.sleep(60)"
    failure = stages.run_bench(["-c", code, str(out)], short, out)
    assert failure["status"] == "failed" and failure["reason"].startswith("stopped after 1 s")
    with pytest.raises(RuntimeError, match="stopped after 1 s"):
        stages.run_bench(["-c", "import time; time.sleep(60)"], short, tmp_path / "nothing")


def test_tests_that_take_too_long_are_a_failure_with_what_has_passed(job, tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('number', range(9))\n"
        "def test_slow(number): time.sleep(0.4)\n"
    )
    found = stages.run_tests(replace(job, seconds=stages.ENDING + 1.0), str(file), "")
    assert found["status"] == "failed" and "session-timeout" in found["reason"]
    assert 0 < found["counts"]["passed"] < 9


def test_a_missing_package_comes_from_a_folder_of_wheels(job, tmp_path):
    info = "onlyhere-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "onlyhere-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("onlyhere.py", "VALUE = 3\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    names = gpu.unpack(tmp_path, tmp_path / "packages", job.environment)
    assert names == ["onlyhere-1.0-py3-none-any.whl"]
    code = "import onlyhere, benchmarks.gpu; print(onlyhere.VALUE)"
    assert stages.start(["-c", code], 60, job.environment).stdout == "3\n"
