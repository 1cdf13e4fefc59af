"""The one loop: rollout -> annotate -> update -> sync -> log -> save. It knows no algorithm."""

from __future__ import annotations

import functools
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

import kernels
from rollouts.streaming.tokens import extend_model
from rollouts.sync import sync_weights
from trainers.base import Parts
from trainers.core import checkpoint, distributed
from trainers.core.batching import empty_like, pack, share, split, unpack
from trainers.core.deepspeed import PolicyEngine
from trainers.core.evaluation import evaluate
from trainers.core.metrics import TokenStats, peak_memory_gib, rollout_metrics
from trainers.core.policy import load_policy
from trainers.core.tracking import Tracker
from trainers.losses import score_tokens
from trainers.modes.rollout import make_engine
from trainers.prepare import Prepared


class Loop:
    """Builds a run's parts from what was checked, and trains.

    Args:
        config: the composed config.
        prepared: tokenizers, prompts and the run directory (trainers/prepare.py).
    """

    def __init__(self, config: DictConfig, prepared: Prepared):
        self.config, self.prepared = config, prepared
        self.device = distributed.setup()
        # The default run directory is named after the time, which each rank read for itself.
        prepared.run_dir = distributed.gather(prepared.run_dir)[0]
        config.run.dir = str(prepared.run_dir)
        kernels.set_backend(config.kernels.backend)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        path = start_model(config.model.path, prepared)
        say(f"loading {config.model.path}")
        self.engine = PolicyEngine(
            load_policy(
                path,
                torch.float32,
                self.device,
                config.model.attn_implementation,
                config.streaming.layout,
                config.model.encoder,
            ),
            config,
            self.device,
        )
        if prepared.checkpoint is not None:
            checkpoint.load(prepared.checkpoint, self.engine)
        method = prepared.method
        self.rollout = None
        if method.samples or prepared.eval_prompts:
            say(f"starting {config.rollout.engine}")
            self.rollout = make_engine(
                config, self.device, self.engine.dtype, prepared.max_length, path
            )
        parts = Parts(
            config,
            self.device,
            prepared.tokenizer,
            prepared.stop_ids,
            prepared.vocab,
            prepared.prompts,
            prepared.sampler,
            prepared.verifier,
            self.rollout,
            teacher_stop=prepared.teacher_stop,
            score_policy=self.score_policy,
        )
        if method.distills:
            from trainers.core.teacher import Teacher

            say(f"loading {config.teacher.path}")
            parts.teacher = Teacher(config, self.device, prepared.vocab)
        self.trainer = method(parts)
        self.loss = self.trainer.loss()

    def fit(self) -> Path:
        """Train to `train.steps`.

        Returns:
            the run directory.
        """
        config, prepared = self.config, self.prepared
        self.tracker = tracker = Tracker(config, prepared.run_dir, prepared.start)
        tracker.say(
            f"run {prepared.run_dir}  ranks {distributed.world_size()}  device {self.device.type}  "
            f"kernels {kernels.active_backend(self.device)}"
        )
        for note in prepared.notes:
            tracker.say(note)
        if self.rollout is not None:
            self.sync(prepared.start)
        if prepared.start == 0:
            self.evaluate(0)
        for step in range(prepared.start + 1, config.train.steps + 1):
            row, trajectories = self.step(step)
            tracker.step(row)
            tracker.completions(step, trajectories[: config.log.completions], prepared.tokenizer)
            last = step == config.train.steps
            if last or (config.eval.every > 0 and step % config.eval.every == 0):
                self.evaluate(step)
            if last or (config.checkpoint.every > 0 and step % config.checkpoint.every == 0):
                self.save(step)
        tracker.finish()
        if self.rollout is not None:
            self.rollout.close()
        return prepared.run_dir

    def step(self, step: int) -> tuple[dict, list]:
        """One rollout batch, and the optimizer updates made on it.

        Returns:
            its metrics, and the trajectories that this rank annotated or nobody learned from.
        """
        started = time.perf_counter()
        clock = {}

        def phase(name: str, since: float) -> float:
            now = time.perf_counter()
            clock[f"time/{name}"] = now - since
            return now

        drawn = self.trainer.draw(step - 1)
        if self.rollout is not None and self.trainer.samples:
            self.rollout.sleep()
        mark = phase("rollout", started)
        parts = self.shares(drawn)
        mark = phase("annotate", mark)
        lr = learning_rate(self.config.train, step)
        stats = TokenStats(
            max(self.config.rollout.max_new_tokens, *(len(t.completion_ids) for t in drawn))
        )
        updates: list[tuple[float, float]] = []
        for part in parts:
            if part:
                updates.append(self.update(part, lr, stats, moved=bool(updates)))
        skipped = len(parts) - len(updates)
        if skipped:
            self.tracker.say(
                f"step {step}: {skipped} of {len(parts)} updates skipped, no sample of theirs was kept"
            )
        loss, norm = np.mean(updates, axis=0).tolist() if updates else (math.nan, math.nan)
        row = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/skipped": skipped,
            **stats.metrics(),
        }
        mark = phase("update", mark)
        if self.rollout is not None and self.trainer.samples:
            self.rollout.wake()
            self.sync(step)
        phase("sync", mark)
        tokens = sum(t.length for t in drawn)
        elapsed = time.perf_counter() - started
        row |= {
            "train/tokens": tokens,
            **clock,
            "time/step": elapsed,
            "perf/tokens_per_second": tokens / elapsed,
            "perf/peak_memory_gib": max(distributed.gather(peak_memory_gib(self.device))),
        }
        if self.trainer.samples:
            row |= rollout_metrics(drawn) | self.trainer.metrics(drawn)
        return {"step": step, **row}, [
            t for t in drawn if "mask" in t.annotations or not self.trainer.keeps(t)
        ]

    def shares(self, drawn: list) -> list[list]:
        """This rank's annotated share of the kept trajectories, for each update of the step; empty
        on all ranks where an update has none. All are annotated before the first update, by the
        policy that drew them."""
        count = self.config.train.minibatches
        bounds = [len(drawn) * index // count for index in range(count + 1)]
        parts = [
            share(
                [t for t in drawn[low:high] if self.trainer.keeps(t)],
                distributed.rank(),
                distributed.world_size(),
            )
            for low, high in zip(bounds, bounds[1:])
        ]
        mine = [trajectory for part in parts for trajectory in part]
        if mine:
            self.trainer.annotate(mine)
        for trajectory in mine:
            if trajectory.padding:
                trajectory.annotations["mask"] = np.zeros(
                    len(trajectory.completion_ids), dtype=bool
                )
        return parts

    def update(
        self, mine: list, lr: float, stats: TokenStats, moved: bool = False
    ) -> tuple[float, float]:
        """Forward and backward over this rank's micro-batches, then one step of the optimizer.

        Args:
            mine: this rank's trajectories of the update, annotated; at least one.
            stats: takes the per-token results.
            moved: an update came between the samples and this one.

        Returns:
            the loss, over all ranks, and the gradient's norm.
        """
        groups = split([t.length for t in mine], self.config.train.tokens_per_microbatch)
        normalizer = self.config.train.normalizer
        total, microbatches, rounds = normalize(mine, normalizer, len(groups))
        loss_sum = 0.0
        batch = None
        for index in range(rounds):
            if index < len(groups):
                batch = pack(mine, groups[index], self.device)
            else:  # ranks must run the same number of backward passes
                batch = empty_like(batch)
            denominator = total
            if normalizer == "microbatch_token_mean":
                denominator = max(float(batch.mask.sum()), 1.0) * microbatches
            output = self.engine.forward(
                batch, functools.partial(self.loss, denominator=denominator)
            )
            self.engine.backward(output["loss"], last=index == rounds - 1)
            loss_sum += float(output["loss"].detach())
            values = {
                name: unpack(batch, mine, tensor)
                for name, tensor in output.items()
                if name != "loss" and tensor is not None and batch.members
            }
            for place, member in enumerate(batch.members):
                arrays = {name: parts[place] for name, parts in values.items()}
                stats.update(mine[member], arrays, moved)
                if "rewards" in arrays:
                    mine[member].annotations["rewards"] = arrays["rewards"]
        norm = self.engine.step(lr)
        return sum(distributed.gather(loss_sum)), norm

    def score_policy(self, trajectories: list) -> None:
        """Write `student_logprobs` [T] (nats) under the current weights, for methods that need them
        before the update. A collective under ZeRO-3: ranks with fewer micro-batches run empty
        ones."""
        groups = split([t.length for t in trajectories], self.config.train.tokens_per_microbatch)
        rounds = max(distributed.gather(len(groups)))
        for index in range(rounds):
            batch = pack(trajectories, groups[min(index, len(groups) - 1)], self.device)
            scored = self.engine.score(
                batch,
                functools.partial(
                    _score, temperature=self.config.rollout.temperature, vocab=self.prepared.vocab
                ),
            )
            for member, array in zip(batch.members, unpack(batch, trajectories, scored)):
                trajectories[member].annotations["student_logprobs"] = array

    def sync(self, step: int) -> None:
        """Bring the rollout engine to the trainer's weights, verified."""
        sync_weights(self.rollout, self.engine.weights, step)

    def evaluate(self, step: int) -> None:
        """Write an evaluation row, if the run evaluates."""
        prepared = self.prepared
        if not prepared.eval_prompts:
            return
        started = time.perf_counter()
        if not self.trainer.samples:
            self.sync(step)
        scores, _ = evaluate(
            self.rollout,
            prepared.eval_prompts,
            self.config,
            prepared.tokenizer,
            prepared.stop_ids,
            prepared.verifier,
            what=f"eval  step {step}  {prepared.eval_name}:",
        )
        row = {
            "step": step,
            **{f"eval/{prepared.eval_name}/{name}": value for name, value in scores.items()},
            "time/eval": time.perf_counter() - started,
        }
        self.tracker.evaluation(row, prepared.eval_name, self.config.eval.k)

    def save(self, step: int) -> None:
        folder = checkpoint.save(
            self.prepared.run_dir,
            step,
            self.engine,
            self.prepared.tokenizer,
            self.prepared.stop_ids,
            self.prepared.facts,
            self.config.checkpoint.keep,
        )
        self.tracker.say(f"saved {folder}")


def say(text: str) -> None:
    """Print a line before there is a tracker, on rank 0."""
    if distributed.rank() == 0:
        print(text, flush=True)


def start_model(path: str, prepared: Prepared) -> str:
    """`path`; or, where the model lacks tokens, the folder RUN/start of a copy that has them. A
    collective."""
    if not prepared.new_tokens:
        return path
    folder = prepared.run_dir / "start"
    if distributed.rank() == 0:
        extend_model(path, prepared.tokenizer, prepared.new_tokens, folder)
    distributed.barrier()
    return str(folder)


def _score(head, hidden, batch, *, temperature, vocab):
    return score_tokens(
        head, hidden, batch, targets=batch.targets, temperature=temperature, vocab=vocab
    ).logprobs


def normalize(mine: list, normalizer: str, groups: int) -> tuple[float, int, int]:
    """What the loss of an update is divided by, per `train.normalizer`. A collective.

    A sequence's length is its number of unmasked tokens; one without any does not count. For
    `sequence_mean` it writes the annotation `weights` [T].

    Args:
        mine: this rank's trajectories, with masks.
        groups: this rank's number of micro-batches.

    Returns:
        (the divisor, the number of micro-batches of all ranks, the most micro-batches of a rank).
    """
    lengths = [int(t.annotations["mask"].sum()) for t in mine]
    if normalizer == "sequence_mean":
        for trajectory, length in zip(mine, lengths):
            trajectory.annotations["weights"] = np.full(
                len(trajectory.completion_ids), 1 / max(length, 1), np.float32
            )
    counts = distributed.gather((groups, sum(lengths), sum(n > 0 for n in lengths), max(lengths)))
    groups, tokens, sequences, longest = zip(*counts)
    total = {"sequence_mean": sum(sequences), "max_length": sum(sequences) * max(longest)}.get(
        normalizer, sum(tokens)
    )
    return float(max(total, 1)), sum(groups), max(groups)


def learning_rate(train, step: int) -> float:
    """The learning rate of step 1, 2, …: linear warm-up, then `train.schedule`."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    left = (train.steps - step + 1) / max(train.steps - train.warmup_steps, 1)
    return train.lr * (left if train.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
