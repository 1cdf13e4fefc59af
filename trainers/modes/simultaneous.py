"""Writing while reading: a decision head says, unit by unit, whether to read on or to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recipes.components import DECISION_HEADS
from recipes.languages import DEFAULT_BLEU_TOKENIZER, bleu_tokenizer, characters, is_spaceless
from rewards.metrics.lag import lags
from rewards.metrics.text import check_bleu, text_scores
from rollouts.data.examples import Example, Prompt
from rollouts.data.load import configured_examples
from rollouts.pretrained import vocabulary
from rollouts.simultaneous.decision import (
    DecisionHead,
    Recorder,
    SimultaneousSampling,
    WaitK,
    character_starts,
    check_heads,
    spellings,
    word_starts,
)
from rollouts.simultaneous.frames import embed, load_encoder
from rollouts.simultaneous.prompts import target_cut, target_language, unit_prompts
from rollouts.trajectory import Trajectory
from trainers.core.distributed import gather, shard_contiguous
from trainers.modes.plain import Plain, make_requests

LAGS = ("rco", "ail", "al", "laal")


class Simultaneous(Plain):
    """`streaming.layout` scheduled (docs/specification.md, 5)."""

    sources = "sources and thoughts"
    masked = True

    def __init__(self, config):
        """Raises ConfigError: the tokenizer of BLEU cannot be used here."""
        super().__init__(config)
        language = target_language(config)
        # The words of targets are characters.
        self.by_character = is_spaceless(language)
        self.bleu_tokenizer = config.eval.bleu_tokenizer or bleu_tokenizer(language)
        if config.eval.every >= 0:
            check_bleu(self.bleu_tokenizer)

    def prompts(
        self, examples: Sequence[Example], tokenizer, where: str
    ) -> tuple[list[Prompt], int]:
        return unit_prompts(examples, tokenizer, self.config, where)

    def extra_tokens(self, prompt: Prompt) -> int:
        return sum(map(len, prompt.opening))

    def embedder(self, device) -> Callable | None:
        if self.config.model.encoder is None:
            return None
        encoder = load_encoder(self.config.model.encoder, device)
        return lambda model, ids, frames: embed(model, encoder, ids, frames)

    def sampling(self, tokenizer, stop_ids: Sequence[int], **limits) -> SimultaneousSampling:
        """Without a decision head, which `evaluation_sampling` adds."""
        if "vocab" not in limits:
            limits["vocab"], limits["missing"] = vocabulary(tokenizer)
        options = self.config.proactive
        starts = self.starts(tokenizer).copy()
        # To stop is a decision too.
        starts[list(stop_ids)] = 1
        return SimultaneousSampling(
            stop_ids=tuple(stop_ids),
            word_starts=starts,
            whole_words=options.whole_words,
            max_reads=options.max_reads,
            min_lag=options.min_lag,
            max_lag=options.max_lag,
            **limits,
        )

    def starts(self, tokenizer) -> np.ndarray:
        """[V]: the tokens that begin a word, as the language of the targets has them."""
        return character_starts(tokenizer) if self.by_character else word_starts(tokenizer)

    def parity_sampling(self, run, max_new_tokens: int) -> SimultaneousSampling:
        """With a head that reads and writes by turns, and needs no calibration."""
        return replace(super().parity_sampling(run, max_new_tokens), head=WaitK(2))

    def evaluation_sampling(self, run) -> SimultaneousSampling:
        sampling = super().evaluation_sampling(run)
        return replace(sampling, head=self.decision_head(run, sampling))

    def decision_head(self, run, sampling: SimultaneousSampling) -> DecisionHead:
        """`proactive.head` with its setting.

        Where `proactive.setting` is null, it is measured on the calibration set: a collective.

        Raises:
            ConfigError: a setting is out of range or missing.
            DataError: there is nothing to calibrate on.
        """
        options = self.config.proactive
        check_heads(options)
        kind = DECISION_HEADS.resolve(options.head)
        if options.setting is not None:
            return kind(options.setting)
        if not kind.calibrated:
            return kind(0.0)
        return kind(self.calibrate(kind, run, sampling).quantile(options.quantile))

    def calibrate(self, kind: type[DecisionHead], run, sampling: SimultaneousSampling) -> Recorder:
        """The head's scores on the calibration set with the whole input read. A collective."""
        config, options = self.config, self.config.proactive
        path = options.calibration_path or config.data.path
        size = options.calibration_size
        examples = configured_examples(config.data, config.seed, path, limit=size, size=size)
        where = f"proactive.calibration_path={path}"
        prompts, _ = unit_prompts(examples, run.tokenizer, config, where)
        recorder = Recorder(kind(kind.low))
        requests = make_requests(shard_contiguous(prompts), 1, lambda index, sample: index)
        run.rollout.generate(requests, replace(sampling, head=recorder, temperature=0.0))
        recorder.scores = [score for part in gather(recorder.scores) for score in part]
        return recorder

    def text_ids(self, trajectory: Trajectory) -> list[int]:
        """Without the opening, which was not sampled, and the stop token."""
        ids = super().text_ids(trajectory)
        opening = len(trajectory.sampled) - int(trajectory.sampled.sum())
        return ids[opening:]

    def metrics(
        self, run, trajectories: Sequence[Trajectory], sampling: SimultaneousSampling
    ) -> dict[str, float]:
        """Means over the completions of all ranks, BLEU and chrF of the corpus.

        Returns:
            `bleu`, `chrf` (0 to 100), `f1`, `exact` (0 to 1; rewards/metrics/text.py); `rco`,
                `ail`, `al`, `laal` in source units (rewards/metrics/lag.py), over the completions
                that are not empty, NaN if all are; `head_setting`.
        """
        rows = self._rows(run, trajectories, sampling.word_starts)
        texts, references, measured = zip(*rows)
        lag_rows = [lag for lag in measured if lag]
        lag_means = {
            name: float(np.mean([lag[name] for lag in lag_rows])) if lag_rows else float("nan")
            for name in LAGS
        }
        scores = text_scores(list(texts), list(references), self.bleu_tokenizer) | lag_means
        return scores | {"head_setting": sampling.head.setting}

    def _rows(
        self, run, trajectories: Sequence[Trajectory], starts: np.ndarray
    ) -> list[tuple[str, tuple[str, ...], dict[str, float]]]:
        """Text, references and lags of each completion of all ranks."""
        by_index = {prompt.index: prompt for prompt in run.eval_prompts}
        cut = target_cut(self.config)
        texts = spellings(run.tokenizer) if self.by_character else None
        rows = []
        for trajectory in trajectories:
            prompt = by_index[trajectory.prompt_index]
            example = prompt.example
            references = example.references or (example.solution or example.answer,)
            spent = delays(trajectory, starts, texts).tolist()
            units, words = len(prompt.segments) - 1, len(cut(references[0]))
            rows.append(
                (trajectory.completion, references, lags(spent, units, words) if spent else {})
            )
        return [row for part in gather(rows) for row in part]

    def summary(self, scores: dict[str, Any]) -> str:
        cut = self.bleu_tokenizer
        label = "bleu" if cut == DEFAULT_BLEU_TOKENIZER else f"bleu ({cut})"
        return f"{label} {scores['bleu']:.1f}  al {scores['al']:.2f}  rco {scores['rco']:.2f}  "


def delays(
    trajectory: Trajectory, starts: np.ndarray, texts: Sequence[str] | None = None
) -> np.ndarray:
    """Source units that were read when each target word was complete, i.e. at its last token.

    Args:
        trajectory: with `reads`; its stop token is no word.
        starts: [V] bool, the tokens that begin a word.
        texts: [V] of the tokens; words are then the characters of the text that they spell.

    Returns:
        [words] int.
    """
    sampled = trajectory.sampled_mask
    ids, reads = np.asarray(trajectory.completion_ids)[sampled], trajectory.reads[sampled]
    if trajectory.finish_reason == "stop":
        ids, reads = ids[:-1], reads[:-1]
    if not len(ids):
        return reads
    begun = starts[ids].astype(int) if texts is None else _begun([texts[i] for i in ids])
    # The first token begins a word, whatever it is.
    begun[0] = max(begun[0], 1)
    first = np.flatnonzero(begun)
    # Of the words that a token begins, the last is complete before the next word begins.
    complete = np.repeat(reads[first], begun[first])
    complete[np.cumsum(begun[first]) - 1] = reads[np.append(first[1:], len(ids)) - 1]
    return complete


def _begun(texts: Sequence[str]) -> np.ndarray:
    """[T] int: how many characters of the joined texts each of them begins."""
    joined = "".join(texts)
    lengths = [len(piece) for piece in characters(joined)]
    before = len(joined) - len(joined.lstrip())
    places = before + np.cumsum([0, *lengths])[:-1]
    owners = np.searchsorted(np.cumsum([len(text) for text in texts]), places, side="right")
    return np.bincount(owners, minlength=len(texts))
