"""Run by test_commands.py: runs Python commands one after another, as new processes would.

The libraries are imported once, and each command gets a fork of this process. That saves it the ten
seconds of its imports. A line of standard input is a command: its words and the file for its
output, as JSON. A line of standard output is its exit status."""

import importlib
import json
import os
import runpy
import sys
import traceback

# No thread has been started when these are imported, so that a fork is whole.
PRELOADED = ("torch", "transformers", "deepspeed", "datasets", "trainers.loop", "trainers.opd")


def run(words: list[str]) -> None:
    """`python WORDS …`: a file, or `-m` and a module."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def in_fork(words: list[str], output: str) -> None:
    """Never returns: ends the process as the command would."""
    status = 1
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, descriptor in ((os.open(os.devnull, os.O_RDONLY), 0), (target, 1), (target, 2)):
            os.dup2(stream, descriptor)
        run(words)
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    sys.path.insert(0, os.getcwd())
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries remark is no status
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        words, output = json.loads(line)
        child = os.fork()
        if not child:
            in_fork(words, output)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=statuses, flush=True)


if __name__ == "__main__":
    main()
