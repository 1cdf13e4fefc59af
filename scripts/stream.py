"""Reads a text at a given pace, and shows a model's thoughts about it sentence by sentence, in the
terminal.

    python -m scripts.stream model=DIR file=story.txt [words_per_minute=150]
    python -m scripts.stream model=DIR question='How many apples are left?' < story.txt
    some-command | python -m scripts.stream model=DIR words_per_minute=0

The model reads the question first: `question=…`; else, of a file, its last question, as in
training; else, of standard input, the first line. A sentence of a file is complete with its last
word, one of standard input when another follows or the input ends. Reading goes on while the model
writes. `words_per_minute=0`, or `pace=0`, waits for nothing.

Decoding is greedy; `temperature=0.7 seed=1` samples. Short keys are `temperature`, `top_p`,
`max_new_tokens` (of the deep segment), `max_thought_tokens` and `dtype`; every other key of the
config works too, e.g. `data.system='…'`."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Iterable, Iterator

from scripts.cli import print_error, quiet_libraries

SHORT = {
    "model": "model.path",
    "temperature": "eval.temperature",
    "top_p": "eval.top_p",
    "dtype": "model.dtype",
    "max_new_tokens": "rollout.max_new_tokens",
    "max_thought_tokens": "streaming.max_thought_tokens",
    "words_per_minute": "pace",
}
THOUGHT, ANSWER = 2, 1  # how a terminal shows them: dim, bold


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.compose import compose
    from recipes.errors import ConfigError, OnstreamError
    from scripts.evaluate import key_values

    try:
        given = key_values(arguments, SHORT, "scripts.stream")
        if "model.path" not in given:
            raise ConfigError("model=… is missing: python -m scripts.stream model=DIR file=PATH")
        file, question, pace = (
            given.pop("file", None),
            given.pop("question", None),
            given.pop("pace", "150"),
        )
        if not re.fullmatch(r"\d+(\.\d+)?", pace):
            raise ConfigError(
                f"words_per_minute={pace} is not a number; give one, 0 for no waiting"
            )
        given = {
            "recipe": "streaming_sft",
            "log.wandb": "disabled",
            "eval.temperature": "0",
            "data.max_prompt_tokens": "1000000",
        } | given  # the context is the limit
        config = compose([f"{key}={value}" for key, value in given.items()])
        if config.streaming.layout != "grouped":
            raise ConfigError(
                f"streaming.layout={config.streaming.layout} cannot be shown live; use grouped"
            )
        watch(config, *read_text(file, question), 60 / float(pace) if float(pace) else 0.0)
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        return 130


def read_text(
    file: str | None, question: str | None
) -> tuple[str, str, Iterable[str], list[str] | None]:
    """What is asked and read.

    Returns:
        its name, for errors; the question; the words, each with the white space after it; and, of a
        file, its sentences.

    Raises:
        DataError: it cannot be read, is empty, or has no sentence end.
    """
    from recipes.errors import DataError
    from rollouts.data.examples import Example
    from rollouts.data.sentences import split_sentences
    from rollouts.streaming.prompts import question_and_sentences

    # opened anew: a thread that still waits for sys.stdin would break the interpreter's end
    if file is None:
        stdin = open(os.dup(sys.stdin.fileno()), encoding="utf-8", errors="replace")
        question = question or stdin.readline().strip()
        if not question:
            raise DataError(
                "standard input: the text is empty; its first line is the question, or give question=…"
            )
        return (
            "standard input",
            question,
            (word for line in stdin for word in re.findall(r"\S+\s*", line)),
            None,
        )
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"file={file} cannot be read: {error.strerror}") from error
    sentences = split_sentences(text)
    if not sentences:
        raise DataError(f"file={file}: the text is empty")
    check_end(sentences[-1] if len(sentences) == 1 else ".", f"file={file}")
    if question is None:
        question, sentences = question_and_sentences(
            Example(0, [{"role": "user", "content": text}]), f"file={file}"
        )
    return (
        f"file={file}",
        question,
        (word for sentence in sentences for word in sentence.split()),
        sentences,
    )


def check_end(sentence: str, name: str) -> None:
    """Raises DataError: the only sentence of a text does not end."""
    from recipes.errors import DataError
    from rollouts.data.sentences import CLOSING, SENTENCE_ENDS

    if sentence.rstrip(CLOSING)[-1:] not in SENTENCE_ENDS:
        raise DataError(
            f"{name}: no sentence end was found in the text, so it cannot be read step by step; end its "
            "sentences with . ! or ?"
        )


def arrive(words: Iterable[str], seconds: float) -> Iterator[tuple[str, float]]:
    """Words with the times when they came, `seconds` apart at least; they keep coming while nobody
    looks."""
    queue: SimpleQueue = SimpleQueue()

    def read() -> None:
        due = time.perf_counter()
        try:
            for word in words:
                due = max(due + seconds, time.perf_counter())
                time.sleep(max(due - time.perf_counter(), 0))
                queue.put((word, time.perf_counter()))
        finally:
            queue.put(None)

    threading.Thread(target=read, daemon=True).start()
    yield from iter(queue.get, None)


def sentences_of(
    words: Iterator[tuple[str, float]], known: list[str] | None, name: str
) -> Iterator[tuple[str, float]]:
    """Sentences as they become complete, each with the time of the last word so far.

    Raises:
        DataError: there is none, or only one that does not end.
    """
    from recipes.errors import DataError
    from rollouts.data.sentences import split_sentences

    for sentence in known or ():
        yield sentence, [next(words)[1] for _ in sentence.split()][-1]
    text, when, first = "", 0.0, known is None
    for word, when in words:
        text += word
        if text.count('"') % 2 or text.count("“") > text.count("”"):
            continue  # inside a quotation, which may go on over several sentences
        *whole, last = split_sentences(text) or [""]
        for sentence in whole:
            first = False
            yield sentence, when
        text = last + text[len(text.rstrip()) :]
    if first and not text:
        raise DataError(f"{name}: the text is empty; nothing follows the question")
    if first:
        check_end(text.strip(), name)
    for sentence in split_sentences(text):
        yield sentence, when


def watch(
    config, name: str, question: str, words: Iterable[str], known: list[str] | None, seconds: float
) -> None:
    """Read, think, answer, and print all of it; `seconds` is between words, the rest as `read_text`
    gives it.

    Raises:
        ModelError: the model cannot be loaded, or has no protocol tokens.
        DataError: the text is empty, longer than the context, or holds a protocol token.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from recipes.errors import DataError
    from rewards.metrics.latency import to_answer
    from rollouts.data.examples import Example, Prompt
    from rollouts.data.marks import SKIP
    from rollouts.streaming.prompts import streaming_prompts
    from rollouts.streaming.tokens import Protocol
    from trainers.core.policy import DTYPES, check_model
    from trainers.core.rollout import make_engine
    from trainers.modes import reading_mode

    def prompt(sentences: Iterable[str]) -> Prompt:
        example = Example(
            0,
            [{"role": "user", "content": question}],
            sentences=tuple(sentences),
            question=question,
        )
        return streaming_prompts([example], tokenizer, config, name)[0][0]

    def check_room(source: int, target: int) -> None:
        context = getattr(model, "max_position_embeddings", None)
        if context and max(source, config.streaming.target_offset + target) > context:
            raise DataError(
                f"{name}: text and thoughts are longer than the model's context of {context} tokens; give "
                "a shorter text"
            )

    disable_progress_bar()
    tokenizer, model = check_model("model", config.model.path)
    protocol = Protocol.of(tokenizer)
    if known is not None:
        check_room(len(prompt(known).token_ids), 0)
    sampling = reading_mode(config).sampling(
        tokenizer,
        [*tokenizer.stop_ids, *config.rollout.stop_ids],
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    live = make_engine(config, device, DTYPES[config.model.dtype], 0).live(sampling, config.seed)

    def write(style: int, deep: bool = False) -> tuple[list[int], list[float]]:
        """Print tokens as they come; returns them and when they did."""
        ends = {*(sampling.stop_ids if deep else sampling.thought_stops)} - {protocol.skip}
        ids, times, start, text, shown = [], [], 0, "", 0
        for token, _, _ in live.write(deep):
            times.append(time.perf_counter())
            ids.append(token)
            if deep and token == protocol.eor and not start:
                show(text[shown:], style)
                show("\n= ")
                style, start, text, shown = ANSWER, len(ids), "", 0
                continue
            text = tokenizer.decode([i for i in ids[start:] if i not in ends])
            if not text.endswith("\ufffd"):  # else the rest of a character is still to come
                show(text[shown:], style)
                shown = len(text)
        show(text[shown:], style)
        show("\n")
        return ids, times

    show(f"? {question}\n")
    streamed = skipped = count = 0
    when = time.perf_counter()
    for sentence, when in sentences_of(arrive(words, seconds), known, name):
        parts = prompt([sentence])
        pairs = (
            zip_longest(parts.segments, parts.opening, fillvalue=())
            if count == 0
            else [(parts.segments[-1], ())]
        )
        for segment, opening in pairs:
            longest = sampling.max_thought_tokens + sampling.max_new_tokens
            check_room(live.read + len(segment), live.wrote + len(opening) + longest)
            live.feed(segment)
            if opening:
                live.force(opening)
        show(f"{sentence}\n    ")
        ids, _ = write(THOUGHT)
        count, streamed, skipped = (
            count + 1,
            streamed + len(ids),
            skipped + (ids == [protocol.skip]),
        )
    show("    ")
    ids, times = write(THOUGHT, deep=True)
    show(
        f"{count} sentences, {skipped} {SKIP}; {streamed} tokens streamed, {len(ids)} deep; answer "
        f"{times[to_answer(ids, protocol.eor) - 1] - when:.2f} s after the last word\n"
    )


def show(text: str, style: int = 0) -> None:
    """Print at once; styles are for terminals."""
    print(
        f"\x1b[{style}m{text}\x1b[0m" if style and text and sys.stdout.isatty() else text,
        end="",
        flush=True,
    )


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
