"""The verifier of code: what a program is kept from, and what it scores."""

import os
import socket
import sys
import threading
import time

import pytest

from recipes.compose import compose
from recipes.errors import ConfigError
from rewards.code import Code, program_of

ENABLED = ("recipe=grpo", "reward.verifier=code", "reward.code.enabled=true")


def rewards(*overrides: str):
    return compose([*ENABLED, *(f"reward.code.{override}" for override in overrides)]).reward


@pytest.fixture(scope="module")
def code():
    try:
        return Code(rewards("seconds=2", "memory_gib=0.25", "disk_mib=1"))
    except ConfigError as error:
        pytest.skip(f"no user namespaces here: {error}")


def score(code, program: str, tests: str = "assert True") -> float | None:
    return code([f"```python\n{program}\n```"], [tests], 30.0)[0]


def test_off_unless_asked_for():
    with pytest.raises(ConfigError, match=r"reward\.code\.enabled=true"):
        Code(compose(["recipe=grpo", "reward.verifier=code"]).reward)


def test_the_last_block_is_the_program():
    assert program_of("```python\na\n```\nthen\n```\nb\n```\n") == "b\n"
    assert program_of("a = 1") == "a = 1"


def test_right_scores_one_and_wrong_zero(code):
    tests = "assert double(2) == 4\nassert double(-3) == -6"
    programs = [
        "def double(x): return 2 * x",
        "def double(x): return x * x",
        "def double(x) return",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import math, re, json, collections, itertools\ndef double(x): return x + x",
    ]
    assert code(programs, [tests] * len(programs), 30.0) == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_without_an_end_ends(code, program):
    started = time.monotonic()
    assert score(code, program) == 0
    assert time.monotonic() - started < 6


def test_a_program_that_leaves_a_process_behind_leaves_none(code):
    mark = f"{os.getpid()}{time.monotonic_ns()}"
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        sleep = "import time; time.sleep(60)"
        os.execv({os.path.realpath(sys.executable)!r}, ["p", "-c", sleep, "{mark}"])
    os._exit(0)
time.sleep(0.3)
"""
    assert score(code, program) == 1
    deadline = time.monotonic() + 5
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)


def alive(mark: str) -> bool:
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if mark.encode() in file.read().split(b"\0"):
                    return True
        except OSError:
            continue
    return False


def test_memory_processes_and_disk_have_limits(code):
    assert score(code, "held = bytearray(50 << 20)") == 1
    assert score(code, "held = bytearray(400 << 20)") == 0
    assert score(code, "open('/tmp/a', 'wb').write(bytes(1 << 19))") == 1
    assert score(code, "open('/tmp/a', 'wb').write(bytes(2 << 20))") == 0
    many = "import os, time\nfor _ in range({}):\n    if os.fork() == 0: time.sleep(5); os._exit(0)"
    assert score(code, many.format(2)) == 1
    assert score(code, many.format(64)) == 0


CONNECT = """
import socket
socket.create_connection(("127.0.0.1", {port}), timeout=1)
"""


def test_a_server_on_this_machine_is_not_reached(code):
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        port = server.getsockname()[1]

        def listen():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                reached.set()

        threading.Thread(target=listen, daemon=True).start()
        assert score(code, CONNECT.format(port=port)) == 0
        assert not reached.wait(0.3)
        # The same program reaches it where it is not isolated: the test can fail.
        assert score(Code(rewards("isolated=false")), CONNECT.format(port=port)) == 1
        assert reached.wait(2)


def test_files_outside_are_neither_written_nor_seen(code, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    assert score(code, f"open({str(secret)!r}).read()") == 0
    assert score(code, f"open({str(secret)!r}, 'w').write('x')") == 0
    inside = os.path.dirname(os.__file__)
    assert score(code, f"open({inside + '/onstream_x'!r}, 'w')") == 0
    assert score(code, "open('/usr/onstream_x', 'w')") == 0
    assert (
        score(code, "import os; assert os.getpid() < 10 and not os.path.exists('/proc/self')") == 1
    )
    assert secret.read_text() == "mine"
