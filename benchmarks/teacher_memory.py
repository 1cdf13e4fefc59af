"""Peak memory of a run whose teacher is in process, resting, colocated, or served.

    python -m benchmarks.teacher_memory [--model smollm2-135m] [--teacher smollm2-135m]
        [--places process resting colocated served] [--out FILE] [KEY=VALUE …]

Each place gets a run of two steps of `recipe=poweropd` in a process of its own. `trainer` is its
`perf/peak_memory_gib`: of the rank's GPU, or of its process on a CPU. `vLLM` is the host memory of
vLLM's processes beside it: the sum of each one's peak. Both are in GiB. Keys are those of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PLACES = {
    "process": (),
    "resting": ("teacher.rest=true",),
    "colocated": ("teacher.engine=vllm",),
    "served": (),
}
RUN = (
    "recipe=poweropd rollout.engine=hf train.steps=2 train.prompts_per_step=4 data.stories=16 "
    "rollout.max_new_tokens=40 eval.every=-1"
)
SERVER = "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --enforce-eager"
LINE = "{place:10} trainer {trainer:6.2f}   vLLM {vllm:6.2f}   seconds {seconds:5.0f}"
# Seconds between two looks at the processes, and those that a server gets to start.
PAUSE, START = 0.2, 180


def peaks(session: int) -> dict[int, float]:
    """The peak host memory, GiB, of each process of vLLM in a session, by its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end meanwhile.
        with contextlib.suppress(OSError, IndexError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().lower()
            if int(fields[3]) == session and b"vllm" in words:
                status = (folder / "status").read_text()
                found[int(folder.name)] = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    return found


def started(command: list[str], log) -> subprocess.Popen:
    """A process in a session of its own."""
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=variables, stdout=log, stderr=log, start_new_session=True
    )


@contextlib.contextmanager
def server(model: str, log):
    """A server of a model: its process, and its address."""
    from recipes.embedded import model_folder

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    options = ["--model", model_folder(model), "--port", str(port), "--dtype", "float32"]
    names = ["--served-model-name", model]
    process, url = started([*SERVER.split(), *options, *names], log), f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url + "/health").close()
                break
            time.sleep(PAUSE)
        yield process, f"{url}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def measured(place: str, keys: list[str], teacher: str, folder: Path) -> dict[str, float | str]:
    """The row of a place.

    Raises:
        SystemExit: the run ended early; its last line is the message.
    """
    log = (folder / f"{place}.log").open("w")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(log)
        sessions, command = [], ["train.py", *RUN.split(), *PLACES[place], *keys]
        if place == "served":
            process, url = stack.enter_context(server(teacher, log))
            sessions.append(process.pid)
            command.append(f"teacher.url={url}")
        run = started([*command, f"run.dir={folder / place}"], log)
        sessions.append(run.pid)
        found: dict[int, float] = {}
        while run.poll() is None:
            for session in sessions:
                found |= peaks(session)
            # Its keys name vLLM too.
            found.pop(run.pid, None)
            time.sleep(PAUSE)
    if run.returncode:
        raise SystemExit(f"{place}: {Path(log.name).read_text().strip().splitlines()[-1]}")
    rows = (folder / place / "metrics.jsonl").read_text().splitlines()
    trainer = json.loads(rows[-1])["perf/peak_memory_gib"]
    seconds = time.monotonic() - began
    return {"place": place, "trainer": trainer, "vllm": sum(found.values()), "seconds": seconds}


def main(arguments: list[str]) -> int:
    first = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser("python -m benchmarks.teacher_memory", description=first)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=list(PLACES))
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options, keys = parser.parse_known_args(arguments)
    keys = [f"model.path={options.model}", f"teacher.path={options.teacher}", *keys]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for place in options.places:
            rows.append(measured(place, keys, options.teacher, Path(folder)))
            print(LINE.format(**rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
