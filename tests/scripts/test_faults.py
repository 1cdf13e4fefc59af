"""The fault campaign: it finds nothing in a few faults of one recipe, and it can find something."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.golden import RUNS
from scripts import faults
from scripts.fault_campaign import inject, page, runs
from scripts.fault_campaign.cells import KINDS, Cell, Wrong, check_end, check_equal
from scripts.fault_campaign.faults import FAULTS
from scripts.fault_campaign.processes import Ended
from scripts.fault_campaign.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_lost_where_a_run_is_killed_spoilt_or_damaged(run_command):
    done = run_command("-m", "scripts.faults", "--quick", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(faults.QUICK["poweropd"]) and all(": ok  " in line for line in lines)


def test_every_recipe_and_every_fault_has_what_the_campaign_needs():
    assert set(RECIPES) <= set(RUNS)
    for fault in FAULTS.values():
        assert fault.kind in KINDS and (fault.place in inject.PLACES or fault.kind == "corrupt")
        assert set(fault.recipes or ()) <= set(RECIPES)


ENDINGS = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from scripts.fault_campaign import processes

processes.GRACE = 0.2

def fails():
    print("error: step 2: no more", file=sys.stderr)
    sys.exit(1)

def leaves():
    subprocess.Popen(["sleep", "60"])

works = {
    "fine": lambda: print("done"),
    "fails": fails,
    "raises": lambda: 1 / 0,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(60),
    "leaves": leaves,
}
folder = Path(sys.argv[1])
for name, work in works.items():
    ended = processes.start(work, folder / name).wait(1.0)
    print(json.dumps([name, ended.how, ended.message, len(ended.left), ended.out]), flush=True)
"""


def test_the_end_of_a_process_is_seen(tmp_path):
    command = [sys.executable, "-c", ENDINGS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert found["fine"] == ["exit 0", "", 0, "done\n"]
    assert found["fails"] == ["exit 1", "error: step 2: no more", 0, ""]
    assert found["raises"] == ["exit 1", "ZeroDivisionError: division by zero", 0, ""]
    assert found["killed"][0] == "SIGKILL" and found["hangs"][0] == "hung"
    assert found["leaves"][2] == 1


def ended(status=1, error="error: step 2: update: the disk is full\n", hung=False, left=()):
    return Ended(status, 1.0, hung, "", error, left)


@pytest.mark.parametrize(
    "end, verdict",
    [
        (ended(hung=True), "hung"),
        (ended(left=("7 sleep",)), "left over"),
        (ended(error=""), "silent"),
        (ended(error="error: something\n"), "silent"),
        (ended(error="OSError: the disk is full\n"), "traceback"),
        (ended(status=2), "wrong end"),
        (ended(status=0, error=""), "wrong end"),
        (ended(), None),
        # What nobody foresaw has its traceback before the line.
        (ended(error="Traceback\n  x\nerror: step 2: the disk is full\n"), None),
    ],
)
def test_an_end_that_is_not_right_is_named(end, verdict):
    fault = FAULTS["full_disk_records"]
    if verdict is None:
        check_end(end, fault, status=1, says="disk is full")
        return
    with pytest.raises(Wrong) as caught:
        check_end(end, fault, status=1, says="disk is full")
    assert caught.value.verdict == verdict


def a_run(folder: Path, loss: float) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": loss}) + "\n")
    (folder / "completions.jsonl").write_text("")
    return folder


def test_a_run_that_differs_or_leaves_something_is_not_right(tmp_path, monkeypatch):
    first, second = a_run(tmp_path / "a", 1.0), a_run(tmp_path / "b", 2.0)
    with pytest.raises(Wrong, match="lost: .*train/loss"):
        check_equal(first, second)
    monkeypatch.setattr(runs, "differences", lambda *_: [])
    check_equal(first, second)
    (second / "checkpoints" / ".step_2.partial").mkdir(parents=True)
    with pytest.raises(Wrong, match="left over: checkpoints/.step_2.partial"):
        check_equal(first, second)


@pytest.mark.parametrize("before", [True, False])
def test_a_fault_happens_once_at_its_step(before, tmp_path):
    order = []
    owner = SimpleNamespace(work=lambda: order.append("work"))
    scene = inject.Scene(step=2, folder=tmp_path)
    inject.wrap(scene, owner, "work", lambda *_: True, lambda _: order.append("fault"), before)
    owner.work()
    assert not (tmp_path / inject.FIRED).exists()
    scene.now = 2
    owner.work()
    owner.work()
    pair = ["fault", "work"] if before else ["work", "fault"]
    assert order == ["work", *pair, "work"] and (tmp_path / inject.FIRED).exists()


def test_the_page_has_every_cell_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "faults.md")
    cells = [
        Cell("opd", "kill_save", seconds=3.2, end="SIGKILL", repeated=1),
        Cell("opd", "nan", "lost", 4.0, "exit 1", 1, "error: a | b", "row 2 differs"),
        Cell("sft", "kill_save", "-"),
    ]
    text = page.write(cells, 60.0, 2).read_text()
    assert "| `opd` | ok 3 s |" in text and "| `sft` | – |" in text
    assert "| `opd` | **lost** 4 s |" in text and "- opd, `nan`: lost, row 2 differs" in text
    assert "3 cells: 1 ok, 1 not ok, 1 where" in text and "error: a \\| b" in text


@pytest.mark.parametrize("arguments", [["--recipes", "opt"], ["--faults", "fire"]])
def test_an_unknown_name_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        faults.parse(arguments)
    assert caught.value.code == 2 and f"no such name: {arguments[1]}" in capsys.readouterr().err
