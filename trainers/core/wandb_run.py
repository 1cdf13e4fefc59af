"""A run's record in Weights & Biases: whether there is one, whose it is, and what a resume adds.

`metrics.jsonl` and `completions.jsonl` are the run's records. What W&B lacks of them is sent again
when a run continues, so that it has every step once, whatever became of an earlier attempt.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recipes.compose import to_dict
from recipes.errors import ConfigError, one_line

# The file of the run directory that has the run's id in W&B.
ID_FILE = "wandb_id"
# A folder that wandb makes: offline or not, time, id.
FOLDER = re.compile(r"(offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
MODES = ("online", "offline", "disabled")
# Values of WANDB_MODE with another name.
SYNONYMS = {"run": "online", "shared": "online", "dryrun": "offline"}
# Hosts of a saved login, beside that of wandb's settings.
HOSTS = ("api.wandb.ai",)
# Seconds to wait for W&B's server, unless WANDB_INIT_TIMEOUT says another number.
TIMEOUT = 30.0
# The columns of the table of completions, and the most rows that W&B shows.
COLUMNS = ("step", "prompt", "completion", "answer", "reward", "correct")
TABLE_ROWS = 10_000


def check_wandb(config, messages: list[str]) -> None:
    """Find out before a model loads whether wandb can be used.

    Args:
        config: the run's.
        messages: gets a remark where log.wandb=auto goes on without wandb.

    Raises:
        ConfigError: the user asks for W&B, and wandb does not import; or WANDB_MODE is not known.
    """
    if _asked(config) == "disabled":
        return
    try:
        _wandb()
    except ImportError as error:
        if config.log.wandb == "auto":
            messages.append(f"wandb  off: it does not import here ({one_line(error)})")
            return
        raise ConfigError(
            f"log.wandb={config.log.wandb}, but wandb does not import here ({one_line(error)}); "
            "install it, or use log.wandb=disabled"
        ) from error


def mode(config) -> str:
    """One of `MODES`: what the key says; with auto, what WANDB_MODE says; else whether there is a
    key of W&B."""
    asked = _asked(config)
    if asked != "auto":
        return asked
    try:
        # wandb.setup() would start a service, which all later child processes share.
        settings = _wandb().sdk.wandb_setup.singleton().settings
    except ImportError:
        return "disabled"
    hosts = (urlsplit(settings.base_url).netloc, *HOSTS)
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    known = any(map(os.environ.get, keys)) or settings.api_key or _has_login(hosts)
    return "online" if known else "offline"


def _wandb():
    """The package, which reads its settings when it is imported."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb


def _asked(config) -> str:
    """One of `MODES`, or auto. Raises ConfigError: WANDB_MODE is none of them."""
    if config.log.wandb != "auto":
        return config.log.wandb
    given = os.environ.get("WANDB_MODE", "").strip().lower()
    given = SYNONYMS.get(given, given)
    if given and given not in MODES:
        raise ConfigError(f"WANDB_MODE={given} is not known; one of: {', '.join(MODES)}")
    return given or "auto"


def _has_login(hosts: tuple[str, ...]) -> bool:
    """Whether the file of `wandb login` has an entry for one of these hosts."""
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(logins.authenticators(host) for host in hosts)


def identity(run_dir: Path) -> str:
    """The run's id in W&B, which its directory keeps.

    It is random, so another run has another id, also one at the same path. A run of an older
    version saved none; its id is in the names of wandb's folders.
    """
    file = run_dir / ID_FILE
    saved = file.read_text().strip() if file.exists() else ""
    if not saved:
        names = sorted(path.name for path in (run_dir / "wandb").glob("*run-*"))
        found = [match["id"] for name in names if (match := FOLDER.fullmatch(name))]
        saved = found[-1] if found else secrets.token_hex(8)
        file.write_text(saved + "\n")
    return saved


class WandbRun:
    """The record of a run, online or offline.

    Args:
        config: the run's.
        run_dir: the run directory; its files hold what came before.
        start: the step that the run continues after.
    """

    def __init__(self, config, run_dir: Path, start: int):
        self.config, self.run_dir = config, run_dir
        # Remarks for the user.
        self.notes: list[str] = []
        self.last = start
        self.id = identity(run_dir)
        self.run = self._begin(mode(config))
        self._catch_up(start)
        self._remove_replaced()

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of metrics.jsonl, whose numbers are charts."""
        self.last = row["step"]
        charts = {
            name: value
            for name, value in row.items()
            if not isinstance(value, list) and value is not None
        }
        self.run.log(charts, step=row["step"])

    def finish(self) -> None:
        """Add the newest completions as a table, and close the record."""
        completions = _rows(self.run_dir / "completions.jsonl")
        rows = deque(([row[name] for name in COLUMNS] for row in completions), maxlen=TABLE_ROWS)
        if rows:
            table = _wandb().Table(list(COLUMNS), list(rows))
            self.run.log({"completions": table}, step=self.last)
        self.run.finish()

    def _begin(self, mode: str):
        """wandb's run; offline where the server cannot be used."""
        if mode == "online":
            before = self._folders()
            try:
                return self._init(mode)
            except Exception as error:
                # Whatever is wrong with the server or the key, the run itself can go on. wandb's
                # service still holds the id.
                _wandb().teardown()
                for folder in self._folders() - before:
                    shutil.rmtree(folder, ignore_errors=True)
                self.notes.append(
                    f"wandb  offline, as online failed ({one_line(error, 160)}); "
                    f"upload later: wandb sync {self.run_dir}/wandb/offline-run-*"
                )
        return self._init("offline")

    def _init(self, mode: str):
        wandb = _wandb()
        return wandb.init(
            project=self.config.log.project,
            name=f"{self.config.recipe}/{self.run_dir.name}",
            id=self.id,
            resume="allow",
            dir=str(self.run_dir),
            mode=mode,
            config=to_dict(self.config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", TIMEOUT)),
            ),
        )

    def _catch_up(self, start: int) -> None:
        """Log the rows of metrics.jsonl that W&B lacks."""
        first = self.run.starting_step
        for row in _rows(self.run_dir / "metrics.jsonl"):
            if row["step"] >= first:
                self.log(row)
        if first > start + 1:
            self.notes.append(
                f"wandb  has steps up to {first - 1} of the interrupted attempt; they stay"
            )

    def _remove_replaced(self) -> None:
        """Remove the offline records of earlier attempts: this one has all that they had."""
        current = Path(self.run.dir).parent.resolve()
        for folder in self._folders():
            if folder.name.startswith("offline-") and folder.resolve() != current:
                shutil.rmtree(folder)

    def _folders(self) -> set[Path]:
        """The folders of this run's records."""
        return {
            path
            for path in (self.run_dir / "wandb").glob("*run-*")
            if (match := FOLDER.fullmatch(path.name)) and match["id"] == self.id
        }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl."""
    # A line feed alone ends a line; texts hold other line ends.
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)
