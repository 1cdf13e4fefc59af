"""The one loop: rollout -> annotate -> update -> sync -> log -> save. It knows no algorithm."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import kernels
from recipes.embedded import model_folder
from recipes.errors import TrainingError
from rollouts.sync import sync_weights
from rollouts.trajectory import Trajectory
from trainers.core import checkpoint, distributed, lock, random_states, watchdog
from trainers.core.batching import MicroBatch, make_microbatches, pack, unpack
from trainers.core.deepspeed import PolicyEngine
from trainers.core.metrics import TokenStats, peak_memory_gib, rollout_metrics
from trainers.core.policy import DTYPES, load_policy
from trainers.core.preemption import StopRequest
from trainers.core.rollout import make_engine
from trainers.core.scoring import score_tokens
from trainers.core.tracking import Tracker
from trainers.core.updates import microbatches, shards
from trainers.evaluation import evaluate
from trainers.parity import check_parity
from trainers.run import Run
from trainers.start_model import start_model


class Loop:
    """Loads a run's models, and trains.

    Args:
        run: checked by `trainers.prepare`; its last section is filled in here.
    """

    def __init__(self, run: Run):
        self.run = run
        run.device = distributed.setup(run.config.deadline.longest())
        # The default run directory is named after the time, which each rank read for itself.
        run.place(distributed.gather(run.directory)[0])
        self.lock = lock.hold(run.directory)
        self.config = config = run.config
        random_states.seed(config.seed)
        path = self.start_path = start_model(run)
        adapt = adapters(run)
        say(f"loading {config.model.path}")
        policy = load_policy(
            path,
            # Weights that learn are loaded in float32; DeepSpeed makes a copy in the model's type.
            torch.float32 if adapt is None else DTYPES[config.model.dtype],
            run.device,
            config.model.attn_implementation,
            masked=run.mode.masked,
            embed=run.mode.embedder(run.device),
            missing=run.missing,
            adapt=adapt,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.engine = PolicyEngine(policy, config)
        if run.checkpoint is not None:
            checkpoint.load_state(run.checkpoint, self.engine)
        if run.method.samples or run.eval_prompts:
            say(f"starting {config.rollout.engine}")
            engine = make_engine(config, run.device, self.engine.dtype, run.max_length, path)
            run.rollout = run.mode.wrap(engine)
        run.score_policy, run.write_scores = self.score_policy, self.write_scores
        run.policy_head = policy.head
        if run.method.distills:
            from trainers.core.teachers import make_teachers

            run.teacher = make_teachers(run, say)
        self.trainer = run.method(run)
        self.loss = self.trainer.loss()
        # Last: vLLM seeds torch's generator as it starts. Each rank draws its own dropout.
        random_states.seed(config.seed + distributed.rank())
        if run.checkpoint is not None:
            random_states.load(run.checkpoint)
        # Updates in a row that were skipped, as they were not finite.
        self.nonfinite = 0
        self.tracker: Tracker | None = None

    @watchdog.during("report")
    def fit(self) -> bool:
        """Train to `train.steps`, or to the step at which a signal asks for an end.

        Returns:
            whether all steps are done. Where they are not, the last one is saved.
        """
        config, run = self.config, self.run
        request = StopRequest()
        self.tracker = tracker = Tracker(run.config, run.directory, run.start, run.mode.summary)
        run.say = tracker.say
        tracker.say(
            f"run {run.directory}  ranks {distributed.world_size()}  device {run.device.type}  "
            f"kernels {kernels.active_backend(run.device)}"
        )
        for message in run.messages:
            tracker.say(message)
        # A method that reads its sequences syncs for each evaluation, the first one too.
        if run.rollout is not None and (self.trainer.samples or run.start):
            self.sync(run.start)
        if run.rollout is not None:
            tracker.say(check_parity(run, self.engine))
            if not self.trainer.samples and run.start and run.start < config.train.steps:
                run.rollout.sleep()
        # A run that was killed as it evaluated has saved that step.
        if run.start == 0 or tracker.lacks_evaluation(self.is_due(run.start, config.eval.every)):
            self.evaluate(run.start)
        for step in range(run.start + 1, config.train.steps + 1):
            row, trajectories = self.step(step)
            tracker.step(row)
            tracker.completions(step, trajectories[: config.log.completions], run.tokenizer)
            stopped = request.agreed() and step < config.train.steps
            # Saved first, so that an evaluation that fails loses nothing.
            if stopped or self.is_due(step, config.checkpoint.every):
                self.save(step)
            if stopped:
                tracker.say(f"stopped by a signal after step {step}; continue with resume=auto")
                break
            if self.is_due(step, config.eval.every):
                self.evaluate(step)
        else:
            stopped = False
        tracker.finish()
        request.close()
        return not stopped

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done every so many steps, and at the end, is done now."""
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    @watchdog.during("report")
    def finish(self) -> None:
        """The method's own measurements when training is over; then the engine is closed."""
        try:
            if self.config.train.steps:
                self.trainer.after_training()
        finally:
            if self.run.rollout is not None:
                self.run.rollout.close()

    def step(self, step: int) -> tuple[dict, list[Trajectory]]:
        """One rollout batch, and the optimizer updates made on it.

        Returns:
            its metrics, and the trajectories that this rank annotated or nobody learned from.
        """
        clock = Clock()
        samples = self.run.rollout is not None and self.trainer.samples
        with watchdog.phase("rollout", step):
            trajectories = self.trainer.draw(step - 1)
            if samples:
                self.run.rollout.sleep()
        clock.lap("rollout")
        with watchdog.phase("annotate"):
            parts = shards(self.trainer, trajectories, self.config.train.minibatches)
        clock.lap("annotate")
        longest = max(len(t.completion_ids) for t in trajectories)
        stats = TokenStats(max(self.config.rollout.max_new_tokens, longest))
        row = self.optimize(step, parts, stats) | stats.metrics()
        clock.lap("update")
        if samples:
            with watchdog.phase("sync"):
                self.run.rollout.wake()
                self.sync(step)
        clock.lap("sync")
        tokens, elapsed = sum(t.length for t in trajectories), clock.elapsed()
        row |= {
            "train/tokens": tokens,
            **clock.seconds,
            "time/step": elapsed,
            "perf/tokens_per_second": tokens / elapsed,
            "perf/peak_memory_gib": max(distributed.gather(peak_memory_gib(self.run.device))),
        }
        if self.trainer.samples:
            row |= rollout_metrics(trajectories) | self.trainer.metrics(trajectories)
        shown = [t for t in trajectories if "mask" in t.annotations or not self.trainer.keeps(t)]
        return {"step": step, **row}, shown

    @watchdog.during("update")
    def optimize(
        self, step: int, shards: list[list[Trajectory]], stats: TokenStats
    ) -> dict[str, float]:
        """The optimizer updates of a step; those without a trajectory are skipped and counted."""
        lr = learning_rate(self.config.train, step)
        results: list[tuple[float, float]] = []
        nonfinite = 0
        for trajectories in filter(None, shards):
            loss, norm = self.update(trajectories, lr, stats, moved=bool(results))
            if math.isfinite(norm):
                results.append((loss, norm))
            else:
                nonfinite += 1
            self.count_nonfinite(step, norm)
        skipped = sum(not trajectories for trajectories in shards)
        if skipped:
            self.tracker.say(
                f"step {step}: {skipped} of {len(shards)} updates skipped, no sample of theirs "
                "was kept"
            )
        loss, norm = np.mean(results, axis=0).tolist() if results else (math.nan, math.nan)
        return {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": lr,
            "train/skipped": skipped,
            "train/nonfinite": nonfinite,
        }

    def count_nonfinite(self, step: int, norm: float) -> None:
        """Count an update that was skipped, as its gradient's norm says.

        Raises:
            TrainingError: it is the last of `train.max_nonfinite` in a row.
        """
        if math.isfinite(norm):
            self.nonfinite = 0
            return
        self.nonfinite += 1
        limit = self.config.train.max_nonfinite
        if self.nonfinite == limit:
            raise TrainingError(
                f"step {step}: the loss or gradient of {limit} updates in a row was not finite "
                "(train.max_nonfinite); lower train.lr, look for NaN in the rewards, or resume "
                "from a checkpoint"
            )
        self.tracker.say(f"step {step}: an update skipped, its loss or gradient was not finite")

    def update(
        self, trajectories: list[Trajectory], lr: float, stats: TokenStats, moved: bool = False
    ) -> tuple[float, float]:
        """Forward and backward over this rank's micro-batches, then one step of the optimizer.

        Args:
            trajectories: this rank's, annotated; at least one.
            lr: the learning rate.
            stats: takes the per-token results.
            moved: an update came between the samples and this one.

        Returns:
            the loss, over all ranks, and the gradient's norm; infinite where it was not finite and
            the weights stayed.
        """
        loss_sum = 0.0
        for batch, denominator, last in microbatches(
            trajectories, self.config.train, self.run.device
        ):
            loss = functools.partial(self.loss, denominator=denominator)
            output = self.engine.forward(batch, loss)
            self.engine.backward(output["loss"], last=last)
            loss_sum += float(output["loss"].detach())
            self.record_tokens(batch, trajectories, output, stats, moved)
        norm = self.engine.step(lr)
        return sum(distributed.gather(loss_sum)), norm

    def record_tokens(
        self,
        batch: MicroBatch,
        trajectories: list[Trajectory],
        output: dict[str, torch.Tensor],
        stats: TokenStats,
        moved: bool,
    ) -> None:
        """Add a micro-batch's per-token results to the statistics, and keep its rewards."""
        per_token = {
            name: unpack(batch, trajectories, tensor)
            for name, tensor in output.items()
            if name != "loss" and tensor is not None and batch.members
        }
        for place, member in enumerate(batch.members):
            trajectory = trajectories[member]
            arrays = {name: parts[place] for name, parts in per_token.items()}
            means = self.trainer.token_metrics(trajectory, arrays)
            stats.update(trajectory, arrays, moved, means)
            if "rewards" in arrays:
                trajectory.annotations["rewards"] = arrays["rewards"]

    def score_policy(
        self,
        trajectories: list[Trajectory],
        name: str = "student_logprobs",
        adapters: bool = True,
    ) -> None:
        """Write log-probs [T] (nats) of the sampled tokens under the current weights.

        A collective: a rank with fewer micro-batches runs its last one again.

        Args:
            trajectories: this rank's, at least one.
            name: the annotation that is written.
            adapters: false: under the weights without LoRA's adapters.
        """

        def score(head, hidden: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
            scored = score_tokens(
                head,
                hidden,
                targets=batch.targets,
                temperature=self.config.rollout.temperature,
                vocab=self.run.vocab,
            )
            return {name: scored.logprobs}

        self.write_scores(trajectories, score, adapters)

    def write_scores(
        self, trajectories: list[Trajectory], function: Callable, adapters: bool = True
    ) -> None:
        """Write annotations that the current weights give, without gradients.

        A collective: a rank with fewer micro-batches runs its last one again.

        Args:
            trajectories: this rank's, at least one.
            function: maps the head, hidden states [T, H] and their micro-batch to each
                annotation's values [T, …].
            adapters: false: under the weights without LoRA's adapters.
        """
        lengths = [t.length for t in trajectories]
        groups = make_microbatches(lengths, self.config.train.tokens_per_microbatch)
        for index in range(max(distributed.gather(len(groups)))):
            group = groups[min(index, len(groups) - 1)]
            batch = pack(trajectories, group, self.run.device)
            values = self.engine.score(batch, function, adapters)
            for name, tensor in values.items():
                arrays = unpack(batch, trajectories, tensor)
                for member, array in zip(batch.members, arrays):
                    trajectories[member].annotations[name] = array

    @watchdog.during("sync")
    def sync(self, step: int) -> None:
        """Bring the rollout engine to the trainer's weights, verified."""
        sync_weights(self.run.rollout, self.engine.weights, step)

    def evaluate(self, step: int) -> None:
        """Write an evaluation row, if the run evaluates."""
        run = self.run
        if not run.eval_prompts:
            return
        started = time.perf_counter()
        if not self.trainer.samples:
            run.rollout.wake()
            self.sync(step)
        scores, _ = evaluate(run, what=f"eval  step {step}  {run.eval_name}:")
        # A method that reads its sequences needs the engine for evaluations only. After the last
        # one, the method's own measurements may.
        if not self.trainer.samples and step < self.config.train.steps:
            run.rollout.sleep()
        seconds = time.perf_counter() - started
        self.tracker.evaluation(step, scores, run.eval_name, seconds)

    @watchdog.during("save")
    def save(self, step: int) -> None:
        """Write a checkpoint. A collective.

        Raises:
            TrainingError: a weight is not finite. Nothing is written then.
        """
        run = self.run
        if not self.engine.is_finite():
            raise TrainingError(
                f"step {step}: weights are NaN or infinite, so no checkpoint was saved; lower "
                "train.lr, and resume from an earlier checkpoint"
            )
        folder = checkpoint.save(
            run.directory,
            step,
            self.engine,
            run.tokenizer,
            run.stop_ids,
            run.facts,
            self.config.checkpoint.keep,
            base=absolute(model_folder(self.start_path)),
        )
        self.tracker.say(f"saved {folder}")


class Clock:
    """Seconds of the phases of a step, as `time/NAME`."""

    def __init__(self):
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The phase `name` ends now."""
        now = time.perf_counter()
        self.seconds[f"time/{name}"] = now - self.last
        self.last = now

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.started


def say(text: str) -> None:
    """Print a line before there is a tracker, on rank 0."""
    if distributed.rank() == 0:
        print(text, flush=True)
        watchdog.heard()


def absolute(path: str) -> str:
    """A local folder's absolute path; a hub name stays as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def adapters(run: Run) -> Callable[[torch.nn.Module], None] | None:
    """What gives the policy's model its adapters; None: all weights are trained."""
    options = run.config.model.lora
    if options.rank is None:
        return None
    from trainers.core.lora import add_adapters

    return functools.partial(add_adapters, options=options, train_embeddings=bool(run.new_tokens))


def learning_rate(train, step: int) -> float:
    """The learning rate of step 1, 2, …: linear warm-up, then `train.schedule`."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    left = (train.steps - step + 1) / max(train.steps - train.warmup_steps, 1)
    if train.schedule == "linear":
        return train.lr * left
    return train.lr * (1 - math.cos(math.pi * left)) / 2
