"""What every family is held to.

A feature is a function of a `Subject` that returns what it measured, or raises. `FAST` ones take
milliseconds. The others start vLLM, or train as a user does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.compatibility.families import END, END_OF_TURN, FAMILIES, Family, make
from rollouts.trajectory import Request, Sampling, Trajectory, sample_seed

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# Nats, in float32: between a token's log-probs on two ways to compute them.
TOLERANCE = 1e-5
# What an export says where vLLM does not take the family.
PARTLY = "transformers only"
ZERO3 = ("llama-tied", "qwen3-moe", "gemma2")
STEPS = 2
RUN = {
    "train.steps": STEPS,
    "train.prompts_per_step": 4,
    "train.tokens_per_microbatch": 400,
    # The learning rate of a step must not depend on the number of steps, for the resume.
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.lr": 1e-3,
    "data.path": "stories",
    "data.stories": 32,
    "model.dtype": "float32",
    "rollout.max_new_tokens": 16,
    "eval.every": -1,
    "log.wandb": "disabled",
}
# The probabilities of random models are small, and their fifth power gives no reward.
TAUGHT = {"teacher.dtype": "float32", "reward.alpha": 0.1}


class Failure(Exception):
    """A feature that does not hold; its message is one line."""


@dataclass
class Subject:
    """A tiny model of a family, and what was made of it so far.

    Args:
        family: its name.
        folder: an empty folder, for all files.
        tokenizer: the one that all families share.
    """

    name: str
    folder: Path
    tokenizer: object

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @cached_property
    def model(self) -> Path:
        """The folder of the model."""
        return make(self.family, self.folder / "model", self.tokenizer, seed=1)

    @cached_property
    def teacher(self) -> Path:
        """The folder of another model of the family."""
        return make(self.family, self.folder / "teacher", self.tokenizer, seed=2)

    @cached_property
    def policy(self):
        """The model as it is trained."""
        from recipes.compose import compose
        from trainers.core.policy import check_architecture, check_model, load_policy

        attention = compose([]).model.attn_implementation
        _, config = check_model("model.path", str(self.model))
        check_architecture("model.path", str(self.model), config, attention)
        return load_policy(str(self.model), torch.float32, CPU, attention).eval()

    @cached_property
    def requests(self) -> list[Request]:
        """Prompts of several lengths, most of them longer than a window."""
        rng, size = np.random.default_rng(0), len(self.tokenizer)
        lengths = (6, 14, 9, 30, 14, 11)
        return [
            Request(i, 0, tuple(rng.integers(3, size, length).tolist()), sample_seed(0, 1, i, 0))
            for i, length in enumerate(lengths)
        ]

    @property
    def sampling(self) -> Sampling:
        ends = self.tokenizer.convert_tokens_to_ids([END, END_OF_TURN])
        return Sampling(20, stop_ids=tuple(ends), vocab=len(self.tokenizer))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters, a tied head under its own name too."""
        for name, parameter in self.policy.model.named_parameters(remove_duplicate=False):
            yield name, parameter.detach()

    @torch.no_grad()
    def trainer_logprobs(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Of the sampled tokens, packed in one row."""
        from trainers.core.batching import pack, unpack
        from trainers.core.scoring import score_tokens

        batch = pack(trajectories, range(len(trajectories)), CPU)
        scored = score_tokens(
            self.policy.head,
            self.policy.hidden(batch),
            targets=batch.targets,
            temperature=1.0,
            vocab=len(self.tokenizer),
        )
        return unpack(batch, trajectories, scored.logprobs)

    def update(self) -> None:
        """One step of gradient descent on tokens of its own."""
        from trainers.core.batching import pack

        batch = pack(self.samples, range(len(self.samples)), CPU)
        logits = self.policy.head(
            self.policy.hidden(batch), lambda head, hidden: hidden @ head.weight.T
        )
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        with torch.no_grad():
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None

    @cached_property
    def samples(self) -> list[Trajectory]:
        """Completions of random tokens."""
        rng, size = np.random.default_rng(1), len(self.tokenizer)
        return [
            Trajectory(
                request.prompt_index,
                0,
                list(request.prompt_ids),
                rng.integers(3, size, 12).tolist(),
                "length",
                np.zeros(12, np.float32),
            )
            for request in self.requests
        ]

    def engine(self, kind: str):
        """A rollout engine with the model's folder, and the weights of `policy` after `sync`."""
        from recipes.components import ENGINES
        from recipes.compose import compose
        from rollouts.pretrained import context_length

        engine = ENGINES.resolve(kind)
        if check := getattr(engine, "check_model", None):
            check(self.family.title, self.policy.model.config, 64)
        assert context_length(self.policy.model.config) >= 64
        return engine(str(self.model), compose([]), CPU, torch.float32, max_length=64)

    @cached_property
    def huggingface(self):
        return self.engine("hf")

    @cached_property
    def vllm(self):
        return self.engine("vllm")

    @cached_property
    def sampler(self) -> str:
        """The engine of the runs: vLLM where it takes the family."""
        try:
            return "vllm" if self.vllm else "hf"
        except Exception:
            # Its own feature has said why.
            return "hf"

    def train(self, recipe: str, run: str, ranks: int = 0, **changes) -> Path:
        """Train as a user does; returns the run's folder. Raises Failure: with its last line."""
        folder = self.folder / run
        keys = RUN | {
            "recipe": recipe,
            "model.path": self.model,
            "run.dir": folder,
            "rollout.engine": self.sampler,
        }
        if recipe == "poweropd":
            keys |= TAUGHT | {"teacher.path": self.teacher}
        keys |= {name.replace("__", "."): value for name, value in changes.items()}
        command = [sys.executable]
        if ranks:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [*command, "train.py", *(f"{name}={value}" for name, value in keys.items())],
            cwd=ROOT,
            env=environment(ranks),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Failure(f"recipe={recipe} ends with: {last_line(done.stderr)}")
        return folder


def environment(ranks: int) -> dict[str, str]:
    """The variables of a process that trains: its share of the cores, nothing of this process's."""
    variables = dict(os.environ)
    # Loading vLLM set these two kinds.
    for name in os.environ:
        if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith(("MASTER_", "VLLM_")):
            del variables[name]
    if ranks:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    return variables


def gap(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str:
    """The largest difference of log-probs, as text. Raises Failure: it is over the tolerance."""
    worst = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
    if not worst < TOLERANCE:
        raise Failure(f"log-probs differ by {worst:.1e} nats")
    return f"{worst:.1e}"


def loads(subject: Subject) -> str:
    """The config is accepted, and the head is what the kernels take it for."""
    model = type(subject.policy.model).__name__
    rows = len(subject.policy.head.weight)
    if rows <= len(subject.tokenizer):
        raise Failure("the head has no padding rows")
    return model


def packed(subject: Subject) -> str:
    """Log-probs of packed sequences are those of each alone, with eager attention."""
    ours = subject.trainer_logprobs(subject.samples)
    return gap(ours, reference(subject.policy.model, subject.samples, len(subject.tokenizer)))


@torch.no_grad()
def reference(model, trajectories: Sequence[Trajectory], vocab: int) -> list[np.ndarray]:
    """Log-probs [T] of each completion by transformers alone: one forward each, eager attention."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logprobs = []
    for trajectory in trajectories:
        ids = torch.tensor([trajectory.token_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :, :vocab].float()
        start = len(trajectory.prompt_ids)
        rows = logits[start - 1 : -1].log_softmax(-1)
        targets = torch.tensor(trajectory.completion_ids)[:, None]
        logprobs.append(rows.gather(1, targets)[:, 0].numpy())
    model.set_attn_implementation(own)
    return logprobs


def hf_sampler(subject: Subject) -> str:
    """The sampler's log-probs are the trainer's."""
    return sampler_gap(subject, subject.huggingface)


def vllm_sampler(subject: Subject) -> str:
    """The sampler's log-probs are the trainer's."""
    return sampler_gap(subject, subject.vllm)


def sampler_gap(subject: Subject, engine) -> str:
    trajectories = engine.generate(subject.requests, subject.sampling)
    return gap([t.logprobs for t in trajectories], subject.trainer_logprobs(trajectories))


def hf_sync(subject: Subject) -> str:
    """After an update every weight arrives, and one that does not is named."""
    return synced_gap(subject, subject.huggingface)


def vllm_sync(subject: Subject) -> str:
    """After an update every weight arrives, and one that does not is named."""
    return synced_gap(subject, subject.vllm)


def synced_gap(subject: Subject, engine) -> str:
    from rollouts.sync import sync_weights

    before = engine.generate(subject.requests, subject.sampling)
    subject.update()
    sync_weights(engine, subject.weights, salt=1)
    old = [t.logprobs for t in before]
    if np.allclose(np.concatenate(old), np.concatenate(subject.trainer_logprobs(before)), 1e-3):
        raise Failure("the update changed nothing, so the sync shows nothing")
    found = sampler_gap(subject, engine)
    for name, _ in subject.policy.model.named_parameters():
        check_named(subject, engine, name)
    return found


def check_named(subject: Subject, engine, late: str) -> None:
    """Change every weight, and send an old one. Raises Failure: the sync does not name it."""
    from recipes.errors import SyncError
    from rollouts.sync import sync_weights

    weights = {name: tensor.clone() for name, tensor in subject.weights()}
    with torch.no_grad():
        for parameter in subject.policy.parameters():
            parameter.mul_(1.01)
    expected = dict(subject.weights())
    same = expected[late].data_ptr()
    sent = {n: weights[n] if t.data_ptr() == same else t for n, t in expected.items()}
    try:
        sync_weights(Sender(engine, sent), subject.weights, salt=2)
    except SyncError as error:
        if late in str(error):
            return
    raise Failure(f"{late} did not arrive, and the sync did not say so")


@dataclass
class Sender:
    """An engine that gets other tensors than it is said to get."""

    engine: object
    tensors: dict[str, Tensor]

    def load_weights(self, weights) -> None:
        self.engine.load_weights((name, self.tensors[name]) for name, _ in weights)

    def fingerprints(self, names, salt):
        return self.engine.fingerprints(names, salt)


def poweropd(subject: Subject) -> str:
    """Two steps of `recipe=poweropd` with a teacher of the family."""
    return mismatch(subject.train("poweropd", "poweropd"))


def grpo(subject: Subject) -> str:
    """Two steps of `recipe=grpo`, of two updates each, with samples of transformers."""
    run = subject.train(
        "grpo",
        "grpo",
        train__minibatches=2,
        rollout__samples_per_prompt=4,
        rollout__engine="hf",
        reward__verifier="benchmarks.compatibility.features.odd_length",
    )
    return mismatch(run)


def odd_length(completion: str, answer: str) -> float:
    """A reward that random models earn half of the time."""
    return float(len(completion) % 2)


def sft(subject: Subject) -> str:
    """Two steps of `recipe=sft`."""
    losses = [row["train/loss"] for row in rows(subject.train("sft", "sft"))]
    return f"loss {losses[-1]:.2f}"


def rows(run: Path) -> list[dict]:
    """The training rows of a run. Raises Failure: there are fewer than its steps."""
    import json

    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "train/loss" in row]
    if len(found) < STEPS or not all(np.isfinite(row["train/loss"]) for row in found):
        raise Failure(f"{len(found)} of {STEPS} steps have a loss")
    if not all(row["train/grad_norm"] > 1e-3 for row in found):
        raise Failure("a step has no gradient")
    return found


def mismatch(run: Path) -> str:
    """The mean difference between sampler and trainer over a run, as text."""
    gaps = [row["mismatch/logp_abs_mean"] for row in rows(run)]
    # The first update's log-probs are those of the policy that drew the samples.
    if not max(gaps) < TOLERANCE:
        raise Failure(f"sampler and trainer differ by {max(gaps):.1e} nats on average")
    return f"{max(gaps):.1e}"


def export(subject: Subject) -> str:
    """The checkpoint's `model/` gives the same greedy answers in transformers and in vLLM."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = subject.folder / "poweropd" / "checkpoints" / f"step_{STEPS}" / "model"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if set(ends) != set(subject.sampling.stop_ids):
        raise Failure(f"the end tokens are {ends}")
    # transformers' sdpa drops the soft-cap of attention.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = []
    for request in subject.requests:
        ids = torch.tensor([request.prompt_ids])
        mask = torch.ones_like(ids)
        # Rows of padding are in the export too, and no sampler of ours draws them.
        answer = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=list(range(len(subject.tokenizer), model.config.vocab_size)),
        )
        theirs.append(answer[0, ids.shape[1] :].tolist())
    if subject.sampler == "hf":
        return PARTLY
    greedy = Sampling(16, temperature=0.0, stop_ids=tuple(ends), vocab=len(subject.tokenizer))
    exported = Subject(subject.name, subject.folder, subject.tokenizer)
    exported.model = folder
    ours = [t.completion_ids for t in exported.vllm.generate(subject.requests, greedy)]
    exported.vllm.close()
    if ours != theirs:
        raise Failure("greedy answers differ")
    return f"{sum(map(len, ours))} equal tokens"


def resume(subject: Subject) -> str:
    """Two steps and a third after a resume give the weights of three steps, bit for bit."""
    whole = subject.train("poweropd", "whole", train__steps=STEPS + 1)
    resumed = subject.train("poweropd", "poweropd", train__steps=STEPS + 1, resume="auto")
    ours, theirs = (exported(run, STEPS + 1) for run in (resumed, whole))
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if differing:
        raise Failure(f"{len(differing)} tensors differ, as {differing[0]}")
    return f"{len(theirs)} equal tensors"


def exported(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `model/`."""
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step_{step}" / "model" / "model.safetensors")


def zero3(subject: Subject) -> str:
    """Two ranks under ZeRO-3 have the loss and gradient of one rank in the first step."""
    folder = subject.train("poweropd", "zero3", ranks=2, engine="zero3")
    ours, theirs = rows(folder)[0], rows(subject.folder / "poweropd")[0]
    worst = max(
        abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3)
        for name in ("train/loss", "train/grad_norm", "reward/mean")
    )
    if not worst < 1e-3:
        raise Failure(f"loss, gradient or reward differ by {worst:.1e} of their size")
    return f"{worst:.1e}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")


@dataclass(frozen=True)
class Feature:
    """A column of the matrix, and the function that says whether it holds.

    Attributes:
        title: the column's.
        check: returns what it measured, or raises.
        families: those it is tried with; empty for all.
    """

    title: str
    check: Callable[[Subject], str]
    families: tuple[str, ...] = ()


FEATURES = {
    "loads": Feature("loads", loads),
    "packed": Feature("packed = eager", packed),
    "hf_sampler": Feature("hf sampler", hf_sampler),
    "vllm_sampler": Feature("vLLM sampler", vllm_sampler),
    # These change the weights.
    "hf_sync": Feature("hf sync", hf_sync),
    "vllm_sync": Feature("vLLM sync", vllm_sync),
    "poweropd": Feature("PowerOPD", poweropd),
    "grpo": Feature("GRPO", grpo),
    "sft": Feature("SFT", sft),
    "export": Feature("export", export),
    "resume": Feature("resume", resume),
    "zero3": Feature("ZeRO-3", zero3, ZERO3),
}
FAST = ("loads", "packed", "hf_sampler", "hf_sync")
