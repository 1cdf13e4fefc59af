"""Plain reading: the whole prompt first, then the completion. The base of the other modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.calls import Question
from rewards.verification import verdicts
from rollouts.data.chat import tokenize_prompts
from rollouts.data.examples import Example, Prompt
from rollouts.engines.base import Engine
from rollouts.pretrained import vocabulary
from rollouts.trajectory import Request, Sampling, Trajectory

# Fields of an example that a reward function can read.
ROW = ("index", "messages", "answer", "references", "solution", "question", "context", "sentences")


class Plain:
    """A reading mode.

    Attributes:
        sources: what errors call the prompts.
        masked: sequences need an attention mask and positions of their own (rollouts/layout.py).
    """

    sources = "prompts"
    masked = False

    def __init__(self, config):
        self.config = config

    # Prompts

    def prompts(
        self, examples: Sequence[Example], tokenizer, where: str
    ) -> tuple[list[Prompt], int]:
        """The prompts that the examples make, and how many were dropped as over-long.

        Args:
            examples: in the order of the data.
            tokenizer: a Hugging Face tokenizer.
            where: the data's name, for errors.

        Raises:
            DataError: an example cannot be used, or not one prompt fits.
        """
        return self.render(examples, tokenizer, where, self.config.data.max_prompt_tokens)

    def render(
        self, examples: Sequence[Example], tokenizer, where: str, longest: int
    ) -> tuple[list[Prompt], int]:
        """As `prompts`, of up to `longest` tokens each."""
        data = self.config.data
        return tokenize_prompts(
            examples,
            tokenizer,
            max_prompt_tokens=longest,
            template=data.template,
            system=data.system,
            suffix=data.suffix,
            enable_thinking=data.enable_thinking,
            where=where,
        )

    def extra_tokens(self, prompt: Prompt) -> int:
        """The most tokens of a completion that the limit on new tokens does not count."""
        return 0

    def positions(self, prompt: Prompt, new_tokens: int) -> int:
        """The number of positions that a prompt and `new_tokens` take of the model's context."""
        return self._positions(prompt, self.extra_tokens(prompt) + new_tokens)

    def read_positions(self, prompt: Prompt, target: int) -> int:
        """`positions` of a prompt with its opening and a supervised target of so many tokens."""
        return self._positions(prompt, sum(map(len, prompt.opening)) + target)

    def _positions(self, prompt: Prompt, target: int) -> int:
        source = len(prompt.token_ids)
        if self.masked:
            # Source and target have positions of their own.
            return max(source, self.config.streaming.target_offset + target)
        return source + target

    # Sampling

    def wrap(self, engine: Engine) -> Engine:
        """The engine as this mode samples with it."""
        return engine

    def embedder(self, device) -> Callable | None:
        """What turns sources that are no text into input embeddings; None: sources are text."""
        return None

    def sampling(self, tokenizer, stop_ids: Sequence[int], **limits) -> Sampling:
        """How completions are drawn.

        Args:
            tokenizer: a Hugging Face tokenizer; its ids are drawn where `limits` does not say.
            stop_ids: tokens that end a completion.
            limits: the other fields of `Sampling`.
        """
        if "vocab" not in limits:
            limits["vocab"], limits["missing"] = vocabulary(tokenizer)
        return Sampling(stop_ids=tuple(stop_ids), **limits)

    def parity_sampling(self, run, max_new_tokens: int) -> Sampling:
        """How the parity gate draws: at the temperature of training, but short, and of all tokens.

        Args:
            run: a `Run` with its tokenizer.
            max_new_tokens: of a completion.
        """
        return self.sampling(
            run.tokenizer,
            run.stop_ids,
            temperature=self.config.rollout.temperature,
            max_new_tokens=max_new_tokens,
            vocab=run.vocab,
            missing=run.missing,
        )

    def evaluation_sampling(self, run) -> Sampling:
        """How the completions of an evaluation are drawn. A collective where it calibrates.

        Args:
            run: a `Run` (trainers/run.py) with a rollout engine.
        """
        evaluation = self.config.eval
        return self.sampling(
            run.tokenizer,
            run.stop_ids,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            max_new_tokens=evaluation.max_new_tokens or self.config.rollout.max_new_tokens,
            vocab=run.vocab,
            missing=run.missing,
        )

    # Scores

    def score_all(self, run, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]) -> None:
        """Write the texts and, where the example has an answer, the verifier's score.

        Of several right answers, the one that gives the best score counts.

        Args:
            run: a `Run` with its tokenizer and verifier.
            prompts: those of the trajectories, and maybe others.
            trajectories: a batch, whose slow comparisons share `reward.seconds_per_batch`.
        """
        by_index = {prompt.index: prompt for prompt in prompts}
        judged, questions = [], []
        for trajectory in trajectories:
            prompt = by_index[trajectory.prompt_index]
            trajectory.prompt, trajectory.answer = prompt.text, prompt.example.answer
            trajectory.completion = run.tokenizer.decode(self.text_ids(trajectory))
            if trajectory.answer is not None and run.verifier is not None:
                judged.append(trajectory)
                text = self.judged_text(trajectory, run.tokenizer)
                questions.append(question(text, prompt))
        if not judged:
            return
        seconds = self.config.reward.seconds_per_batch
        for trajectory, verdict in zip(judged, verdicts(run.verifier, questions, seconds)):
            trajectory.score, trajectory.timed_out = verdict

    def score_functions(
        self, run, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory]
    ) -> None:
        """Write the scores of `reward.functions` on trajectories that `score_all` has seen.

        Raises:
            TrainingError: a function failed, and no default is stated.
        """
        by_index = {prompt.index: prompt for prompt in prompts}
        questions = [
            question(self.judged_text(t, run.tokenizer), by_index[t.prompt_index])
            for t in trajectories
        ]
        for trajectory, scores in zip(trajectories, run.functions.score(questions)):
            trajectory.functions, trajectory.failures = scores.values, scores.failures

    def text_ids(self, trajectory: Trajectory) -> list[int]:
        """The completion's ids without the stop token, which is not text."""
        stopped = trajectory.finish_reason == "stop"
        return trajectory.completion_ids[:-1] if stopped else trajectory.completion_ids

    def judged_text(self, trajectory: Trajectory, tokenizer) -> str:
        """The part of the completion that the verifier reads."""
        return trajectory.completion

    # Metrics

    def metrics(
        self, run, trajectories: Sequence[Trajectory], sampling: Sampling
    ) -> dict[str, float]:
        """The mode's own metrics of an evaluation, over all ranks. A collective.

        Args:
            run: a `Run` with its evaluation prompts.
            trajectories: this rank's, scored.
            sampling: what they were drawn with.
        """
        return {}

    def summary(self, scores: dict[str, Any]) -> str:
        """The mode's part of an evaluation's printed line."""
        return ""


def question(text: str, prompt: Prompt) -> Question:
    """What a reward function is told of a completion."""
    example = prompt.example
    fields = {name: getattr(example, name) for name in ROW}
    row = {name: value for name, value in fields.items() if value is not None}
    return Question(text, example.right_answers, prompt.text, row)


def make_requests(
    prompts: Sequence[Prompt], samples: int, seed: Callable[[int, int], int]
) -> list[Request]:
    """`samples` requests per prompt, adjacent.

    Args:
        seed: gives the seed of a prompt's index and a sample's.
    """
    return [
        Request(
            prompt.index,
            sample,
            prompt.token_ids,
            seed(prompt.index, sample),
            prompt.segments,
            prompt.opening,
            prompt.example.frames,
        )
        for prompt in prompts
        for sample in range(samples)
    ]
