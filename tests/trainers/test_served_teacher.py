"""A teacher that servers run: the same numbers as in process, or one line within the deadline."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recipes.compose import compose
from recipes.errors import ConfigError, TeacherError
from rollouts.trajectory import Trajectory
from trainers.core.served_teacher import ServedTeacher
from trainers.core.teacher import Teacher
from trainers.core.teachers import make_one, teacher_sections
from trainers.prepare import prepare

KEYS = {"rollout__engine": "hf", "eval__every": -1, "reward__terminal_stop": "cross_eos"}
SHORT = {"retry_seconds": 0.6, "request_seconds": 0.4}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def vllm_server(tiny_models, environment, tmp_path_factory):
    """A real server of the tiny teacher; its address."""
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    url = f"http://127.0.0.1:{port}"
    command = "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --dtype float32"
    options = f"--enforce-eager --max-num-seqs 16 --port {port} --model".split()
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, *command.split(), *options, str(tiny_models["teacher"])],
            env=environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    end = time.monotonic() + 110
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/health").close()
            break
        time.sleep(0.3)
    yield url + "/v1"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(30)


class Faulty:
    """A small server that answers as vLLM does, from a table, but for one fault.

    Args:
        path: of the model that it names.
        faults: of its answers in turn; when they are over it has none. `always` stays.
    """

    def __init__(self, path, *faults: str, always: str = ""):
        self.path, self.always, self.faults = str(path), always, list(faults)
        self.tokenizer, self.asked = AutoTokenizer.from_pretrained(path), 0
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = "another/model" if outer.always == "model" else outer.path
                self.send({"data": [{"id": name, "max_model_len": 2048}]})

            def do_POST(self):
                ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
                outer.asked += 1
                outer.answer(self, ids)

            def send(self, content, status=200):
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, ids: list[int]) -> None:
        fault = self.faults.pop(0) if self.faults else self.always
        if fault == "slow":
            time.sleep(2)
        if fault == "busy":
            return handler.send(b"starting", 503)
        if fault == "garbage":
            return handler.send(b"<html>")
        handler.send({"choices": [self.choice(ids, fault)]})

    def choice(self, ids: list[int], fault: str) -> dict:
        value = {
            "nan": float("nan"),
            "null": None,
            "logits": 3.5,
            "low": -90.0,
            "weights": -2.5,
        }.get(fault, -2.0)
        if fault == "unlike":
            value -= self.asked / 100
        entries = [{str(id): self.entry(id, value, fault)} for id in ids[1:]]
        if fault == "fewer":
            entries.pop()
        if fault == "others":
            entries[-1] = {"3": self.entry(3, value, fault)}
        scored = ids[:-1] if fault == "ids" else ids
        return {"prompt_token_ids": scored, "prompt_logprobs": [None, *entries]}

    def entry(self, id: int, value: float, fault: str) -> dict:
        text = self.tokenizer.decode([id + (fault == "vocabulary")])
        return {"logprob": value, "rank": 2 if fault == "ranks" else 1, "decoded_token": text}


@pytest.fixture
def faulty(tiny_models):
    made = []

    def make(*faults: str, always: str = "") -> Faulty:
        made.append(Faulty(tiny_models["teacher"], *faults, always=always))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def prepared(overrides):
    def make(**keys):
        return prepare(compose(overrides(**KEYS | keys)))

    return make


@pytest.fixture(scope="module")
def run(tiny_models, tmp_path_factory):
    """A run with a teacher in process."""
    student, teacher = (tiny_models[name] for name in ("student", "teacher"))
    keys = "rollout.engine=hf eval.every=-1 data.stories=8 rollout.max_new_tokens=12 "
    keys += f"model.path={student} teacher.path={teacher} run.dir={tmp_path_factory.mktemp('run')}"
    return prepare(compose(["recipe=poweropd", "train.prompts_per_step=8", *keys.split()]))


@pytest.fixture
def teacher(run):
    """A teacher of that run whose servers were not asked yet."""

    def make(*servers: Faulty, **keys) -> ServedTeacher:
        keys["url"] = ",".join(server.url for server in servers)
        section = replace(run.config.teacher, **keys)
        return make_one(section, run)

    return make


def completions(run, lengths=(7, 1, 12, 30, 5)) -> list[Trajectory]:
    """Random ones, of which the first ends on the teacher's own stop token."""
    rng, made = np.random.default_rng(0), []
    for prompt, length in zip(run.prompts, lengths):
        ids = rng.integers(3, 400, length)
        made.append(Trajectory(prompt.index, 0, list(prompt.token_ids), ids.tolist(), "length"))
        made[-1].annotations["teacher_targets"] = ids
    made[0].annotations["teacher_targets"][-1] = run.teacher_stop
    return made


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [None, "'Know {answer}. {prompt}'"])
def test_a_server_and_a_teacher_in_process_agree(prepared, vllm_server, prompt):
    keys = {} if prompt is None else {"teacher__prompt": prompt}
    run = prepared(teacher__url=vllm_server, **keys)
    served, local = completions(run), completions(run)
    make_one(run.config.teacher, run).annotate(served)
    run.device = torch.device("cpu")
    Teacher(run.config.teacher, run).annotate(local)
    gaps = [
        np.abs(one.annotations[name] - two.annotations[name]).max()
        for one, two in zip(served, local)
        for name in ("teacher_logprobs", "teacher_max_logprobs")
    ]
    print(f"largest difference: {max(gaps):.2g} nats")
    assert max(gaps) < 1e-4


@pytest.mark.slow
def test_a_server_with_another_model_or_too_little_room_is_refused(
    prepared, vllm_server, tiny_models
):
    with pytest.raises(TeacherError, match="serves .*, not teacher.path=.*student"):
        prepared(teacher__url=vllm_server, teacher__path=tiny_models["student"])
    # The model's context holds them, but not the one token more that a server writes.
    room = 2048 - max(len(prompt.token_ids) for prompt in prepared().prompts)
    with pytest.raises(TeacherError, match="with a longer --max-model-len"):
        prepared(teacher__url=vllm_server, rollout__max_new_tokens=room)


def ends(teacher, capsys) -> str:
    """The line in which a step ends, within the deadline."""
    started = time.monotonic()
    with pytest.raises(TeacherError) as caught:
        teacher.annotate(completions(teacher.run))
    assert time.monotonic() - started < 1.5 and str(caught.value).count("teacher.url=http") == 1
    # Nothing is said of requests that the first error ended.
    said = capsys.readouterr().out.splitlines()
    assert len(said) <= 1 and "closed" not in "".join(said)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("slow", "no answer within teacher.request_seconds=0.4"),
        ("busy", "does not answer: status 503, starting"),
        ("model", "serves another/model, not teacher.path="),
        ("vocabulary", "has another vocabulary: token "),
        ("garbage", "answers what is no JSON: <html>"),
        ("fewer", "scored other tokens than it was asked for"),
        ("ids", "scored other tokens than it was asked for"),
        ("others", "answers something else than the log-probs"),
        ("ranks", "answers something else than the log-probs"),
        ("nan", "which are no log-probs"),
        ("null", "which are no log-probs"),
        ("logits", "which are no log-probs"),
        ("low", "which are no log-probs"),
        ("unlike", "scores the same ids twice 0.01 nats apart"),
    ],
)
def test_a_fault_of_a_server_ends_in_one_line_within_the_deadline(
    teacher, faulty, fault, said, capsys
):
    assert said in ends(teacher(faulty(always=fault), **SHORT), capsys)


# Two answers are the proof; then the first trajectory's comes.
@pytest.mark.parametrize("fault", ["garbage", "fewer", "ids", "others", "nan", "logits", "low"])
def test_a_fault_after_the_proof_ends_in_one_line_too(teacher, faulty, fault, capsys):
    ends(teacher(faulty("", "", fault), **SHORT), capsys)


def test_a_server_that_is_down(teacher, faulty, capsys):
    server = faulty()
    server.stop()
    server.stop = lambda: None
    assert "does not answer: All connection attempts" in ends(teacher(server, **SHORT), capsys)


def test_errors_that_pass_are_survived_and_said_once(teacher, faulty, capsys):
    made = teacher(faulty("busy", "busy", "", "", "slow"), request_seconds=0.4)
    trajectories = completions(made.run)
    made.annotate(trajectories)
    assert all((t.annotations["teacher_logprobs"] == -2).all() for t in trajectories)
    assert capsys.readouterr().out.count("status 503, starting; asking again for up to 600 s") == 1


def test_a_restart_in_mid_run_is_survived_unless_the_weights_are_others(teacher, faulty):
    server = faulty()
    made = teacher(server, retry_seconds=20)
    made.annotate(completions(made.run))
    server.stop()
    threading.Timer(0.2, server.start).start()
    made.annotate(trajectories := completions(made.run))
    assert (trajectories[0].annotations["teacher_logprobs"] == -2).all()
    server.always = "weights"
    with pytest.raises(TeacherError, match="proved before it score ids 0.5 nats apart"):
        made.annotate(completions(made.run))


def test_servers_take_turns_and_one_that_is_down_is_left_out(teacher, faulty):
    servers = [faulty(), faulty()]
    made = teacher(*servers)
    made.annotate(completions(made.run))
    # Each has its proof, of two requests.
    assert sorted(server.asked - 2 for server in servers) == [2, 3]
    servers[0].stop()
    servers[0].stop = lambda: None
    made.annotate(trajectories := completions(made.run))
    assert all("teacher_logprobs" in t.annotations for t in trajectories)


def test_one_of_several_teachers_may_be_served(prepared, tiny_models, faulty):
    keys = {
        "teachers__a__path": tiny_models["teacher"],
        "teachers__b__path": tiny_models["student"],
    }
    server = faulty()
    run = prepared(**keys, teachers__a__url=server.url, reward__terminal_stop="mask")
    assert server.asked == 2
    one, other = teacher_sections(run.config).values()
    assert (one.url, other.url) == (server.url, None)
    assert type(make_one(one, run)) is ServedTeacher


def test_requests_are_bounded(teacher, faulty):
    made, now, most = teacher(faulty(), concurrency=2), 0, 0
    ask = made._logprobs

    async def counted(*arguments):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        values = await ask(*arguments)
        now -= 1
        return values

    made._logprobs = counted
    made.annotate(completions(made.run))
    assert most == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"objective": "reverse_kl", "reward__terminal_stop": "mask"},
            "objective=reverse_kl compares whole distributions, and teacher.url=",
        ),
        ({"rollout__temperature": 0.7}, "serves log-probs at temperature 1"),
        ({"teacher__path": "self"}, "not teacher.path=self"),
        ({"teacher__url": "localhost:8000"}, "must be addresses as http://HOST:PORT/v1"),
        (
            {"teacher__engine": "vllm"},
            "teacher.engine=vllm scores beside this process, and teacher",
        ),
    ],
)
def test_what_servers_cannot_give_is_refused(prepared, keys, said):
    with pytest.raises(ConfigError) as caught:
        prepared(**{"teacher__url": "http://127.0.0.1:9/v1"} | keys)
    assert said in str(caught.value)


def test_targets_that_change_the_text_are_refused(teacher, faulty):
    made = teacher(faulty())
    trajectories = completions(made.run)
    trajectories[2].annotations["teacher_targets"][3] += 1
    with pytest.raises(TeacherError, match="asks for others before the last"):
        made.annotate(trajectories)
