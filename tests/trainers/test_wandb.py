"""What Weights & Biases has of a run, read back from wandb's own files: who it is, and each step
once."""

import json
import netrc
import sys
from pathlib import Path

import pytest

from recipes.compose import compose
from recipes.errors import ConfigError
from trainers.core.wandb_run import HOSTS, check_wandb, identity, mode


@pytest.fixture(scope="module")
def attempt(run_command):
    """A process that logs some steps (`wandb_worker.py`); what it printed."""

    def attempt(folder, start, last, end="finished", *overrides, **variables):
        own = json.dumps(variables | {"HOME": str(folder.parent)})
        words = (own, folder, start, last, end, *overrides)
        done = run_command("-m", "tests.trainers.wandb_worker", *words, timeout=100)
        assert done.returncode == (9 if end == "killed" else 0), done.stderr[-3000:]
        return done.stdout

    return attempt


def records(file: Path):
    """The records of a .wandb file: LevelDB's log format behind a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = file.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        # A whole record, or the last part of one.
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def synced(folder: Path):
    """Of what `wandb sync folder/wandb/offline-run-*` uploads: the ids, and the rows in order."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    ids, rows = set(), []
    for record in (record for file in files for record in records(file)):
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            named = {item.key or ".".join(item.nested_key): item.value_json for item in items}
            rows.append({key: json.loads(value) for key, value in named.items()})
    return ids, rows


@pytest.fixture(scope="module")
def resumed(attempt, tmp_path_factory):
    """A run that was killed after step 5, continued after step 3 up to 6, and again after 4."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    attempt(folder, 0, 5, "killed", "log.wandb=offline")
    attempt(folder, 3, 6, "finished", "log.wandb=offline")
    before = synced(folder)
    attempt(folder, 4, 8, "finished", "log.wandb=offline")
    return folder, before


@pytest.mark.slow
def test_a_resumed_offline_run_syncs_to_one_run_with_every_step_once(resumed):
    folder, (ids, rows) = resumed
    assert [row["_step"] for row in rows] == list(range(1, 7))
    again, rows = synced(folder)
    assert again == ids == {(folder / "wandb_id").read_text().strip()}
    assert [row["_step"] for row in rows] == list(range(1, 9))
    assert [row["train/loss"] for row in rows] == list(range(1, 9))
    # Each step is that of the attempt which is in metrics.jsonl.
    assert [row["attempt"] for row in rows] == [0] * 3 + [3] + [4] * 4
    evaluated = {row["_step"]: row["eval/data/avg@1"] for row in rows if "eval/data/avg@1" in row}
    assert evaluated == {2: 0.02, 4: 0.04, 6: 0.06, 8: 0.08}


@pytest.mark.slow
def test_the_table_has_the_completions_of_all_attempts(resumed):
    folder, _ = resumed
    (table,) = (folder / "wandb").glob("offline-run-*/files/media/table/*.json")
    rows = json.loads(table.read_text())["data"]
    assert [row[:3] for row in rows] == [[step, "p", f"c{step}"] for step in range(1, 9)]


def test_another_run_at_the_same_path_has_another_id(tmp_path):
    first = identity(tmp_path)
    assert identity(tmp_path) == first
    (tmp_path / "wandb_id").unlink()
    assert identity(tmp_path) != first


def test_a_run_of_an_older_version_keeps_its_id(tmp_path):
    for name in ("offline-run-20260101_000000-aaa", "offline-run-20260102_000000-0f-1"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert identity(tmp_path) == "0f-1"


@pytest.fixture
def keys(monkeypatch, tmp_path):
    """Nobody is logged in, and WANDB_MODE is not set."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


@pytest.mark.parametrize(
    "key, variable, expected",
    [
        ("auto", None, "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "online", "online"),
        ("auto", "dryrun", "offline"),
        ("online", "disabled", "online"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_a_key_wins_over_the_environment_and_that_over_auto(keys, key, variable, expected):
    if variable:
        keys.setenv("WANDB_MODE", variable)
    assert mode(compose([f"log.wandb={key}"])) == expected


def test_auto_is_online_where_a_key_is_known(keys, tmp_path):
    config = compose(["log.wandb=auto"])
    (tmp_path / "netrc").write_text(f"machine {HOSTS[0]} login user password {'a' * 40}\n")
    assert netrc.netrc(tmp_path / "netrc").authenticators(HOSTS[0])
    assert mode(config) == "online"
    keys.setenv("WANDB_MODE", "offline")
    assert mode(config) == "offline"
    keys.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    keys.setenv("WANDB_API_KEY", "a" * 40)
    assert mode(config) == "online"


def test_an_unknown_mode_is_one_line(keys):
    keys.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError, match="WANDB_MODE=of is not known; one of: online, offline"):
        check_wandb(compose([]), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_API_KEY": "too-short"},
        # Nobody listens there.
        {
            "WANDB_API_KEY": "a" * 40,
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_INIT_TIMEOUT": "3",
        },
    ],
    ids=["bad key", "no server"],
)
def test_a_server_that_cannot_be_used_costs_no_run(attempt, tmp_path, variables):
    out = attempt(tmp_path / "run", 0, 2, "finished", "log.wandb=online", **variables)
    (note,) = [line for line in out.splitlines() if line.startswith("wandb")]
    assert note.startswith("wandb  offline, as online failed (")
    ids, rows = synced(tmp_path / "run")
    assert len(ids) == 1 and [row["_step"] for row in rows] == [1, 2]
    assert not list((tmp_path / "run" / "wandb").glob("run-*"))


def test_a_missing_package_is_an_error_only_where_it_is_asked_for(keys):
    keys.setitem(sys.modules, "wandb", None)
    messages = []
    check_wandb(compose(["log.wandb=disabled"]), messages)
    assert messages == []
    check_wandb(compose(["log.wandb=auto"]), messages)
    assert mode(compose(["log.wandb=auto"])) == "disabled" and len(messages) == 1
    for asked in ("online", "offline"):
        with pytest.raises(ConfigError, match=f"log.wandb={asked}, but wandb does not import"):
            check_wandb(compose([f"log.wandb={asked}"]), [])
