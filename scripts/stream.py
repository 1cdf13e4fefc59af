"""Reads a text at a given pace, and shows a model's thoughts about it in the terminal.

    python -m scripts.stream model=DIR file=story.txt
    python -m scripts.stream model=DIR file=story.txt words_per_minute=300 temperature=0.7 seed=1
    python -m scripts.stream model=DIR question='How many apples are left?' < story.txt
    some-command | python -m scripts.stream model=DIR words_per_minute=0

The model reads the question first. A sentence of a file is complete with its last word. A sentence
of standard input is complete when another follows, or when the input ends. Reading goes on while
the model writes.

Decoding is greedy unless `temperature` is given. `max_new_tokens` is the limit of the deep segment.
Every other key of the config works too, as in `data.system='…'`.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue

from recipes.errors import ConfigError, DataError
from scripts.cli import compose_values, key_values, launch, run_command

SHORT_KEYS = {
    "model": "model.path",
    "temperature": "eval.temperature",
    "top_p": "eval.top_p",
    "dtype": "model.dtype",
    "max_new_tokens": "rollout.max_new_tokens",
    "max_thought_tokens": "streaming.max_thought_tokens",
}
OWN_KEYS = {
    "file": "Text to read; default: standard input.",
    "question": "What is asked; default: the last question of a file, as in training, or the first "
    "line of standard input.",
    "words_per_minute": "Pace of the reader; 0 waits for nothing; default: 150.",
    "pace": "Another name of words_per_minute.",
}
# How a terminal shows them: dim, and bold.
THOUGHT_STYLE, ANSWER_STYLE = 2, 1
INTERRUPTED = 130  # exit status after Ctrl-C


@dataclass(frozen=True)
class Text:
    """A question, and a text that arrives word by word."""

    # For error messages.
    name: str
    question: str
    # Each word of standard input comes with the white space after it.
    words: Iterable[str]
    # The sentences of a file; None for standard input, whose sentences are found as they arrive.
    sentences: list[str] | None


def main(arguments: list[str]) -> int:
    """Show a model at work on a text; returns the exit status."""
    try:
        return run_command(show_stream, arguments, __doc__, SHORT_KEYS | OWN_KEYS)
    except KeyboardInterrupt:
        return INTERRUPTED


def show_stream(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS | {"pace": "words_per_minute"},
        module="scripts.stream",
        usage="model=DIR file=PATH",
        required=("model",),
    )
    file = values.pop("file", None)
    question = values.pop("question", None)
    seconds = seconds_per_word(values.pop("words_per_minute", "150"))
    defaults = {
        "recipe": "streaming_sft",
        "log.wandb": "disabled",
        "eval.temperature": "0",
        # The model's context is the limit.
        "data.max_prompt_tokens": "1000000",
    }
    config = compose_values(defaults | values)
    if config.streaming.layout != "grouped":
        raise ConfigError(
            f"streaming.layout={config.streaming.layout} cannot be shown live; use grouped"
        )
    watch(config, read_text(file, question), seconds)


def seconds_per_word(words_per_minute: str) -> float:
    """The time between words, in seconds; 0 for no waiting.

    Raises:
        ConfigError: the pace is not a number of 0 or more.
    """
    if not re.fullmatch(r"\d+(\.\d+)?", words_per_minute):
        raise ConfigError(
            f"words_per_minute={words_per_minute} is not a number; give one, 0 for no waiting"
        )
    pace = float(words_per_minute)
    return 60 / pace if pace else 0.0


def read_text(file: str | None, question: str | None) -> Text:
    """What is asked and read.

    Args:
        file: its path; None for standard input.
        question: None to find it in the text.

    Raises:
        DataError: the text cannot be read, is empty, or has no sentence end.
    """
    return read_stdin(question) if file is None else read_file(file, question)


def read_stdin(question: str | None) -> Text:
    # Opened anew: a thread that still waits for sys.stdin would break the interpreter's end.
    descriptor = os.dup(sys.stdin.fileno())
    # Another thread reads from it until the process ends, so nothing closes it.
    stdin = open(descriptor, encoding="utf-8", errors="replace")  # noqa: SIM115
    question = question or stdin.readline().strip()
    if not question:
        raise DataError(
            "standard input: the text is empty; its first line is the question, or give question=…"
        )
    words = (word for line in stdin for word in re.findall(r"\S+\s*", line))
    return Text("standard input", question, words, sentences=None)


def read_file(file: str, question: str | None) -> Text:
    from rollouts.data.examples import Example
    from rollouts.data.sentences import split_sentences
    from rollouts.streaming.prompts import question_and_sentences

    name = f"file={file}"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    sentences = split_sentences(text)
    if not sentences:
        raise DataError(f"{name}: the text is empty")
    if len(sentences) == 1:
        check_sentence_end(sentences[0], name)
    if question is None:
        example = Example(0, [{"role": "user", "content": text}])
        question, sentences = question_and_sentences(example, name)
    words = (word for sentence in sentences for word in sentence.split())
    return Text(name, question, words, sentences)


def check_sentence_end(sentence: str, name: str) -> None:
    """Refuse a text whose only sentence does not end.

    Raises:
        DataError: it does not end.
    """
    from rollouts.data.sentences import CLOSING, SENTENCE_ENDS

    if sentence.rstrip(CLOSING)[-1:] not in SENTENCE_ENDS:
        raise DataError(
            f"{name}: no sentence end was found in the text, so it cannot be read step by step; "
            "end its sentences with . ! or ?"
        )


def arrive(words: Iterable[str], seconds: float) -> Iterator[tuple[str, float]]:
    """Words, each with the time at which it came.

    Words come at least `seconds` apart. They keep coming while nobody looks.
    """
    arrived: SimpleQueue = SimpleQueue()

    def read() -> None:
        due = time.perf_counter()
        try:
            for word in words:
                due = max(due + seconds, time.perf_counter())
                time.sleep(max(due - time.perf_counter(), 0))
                arrived.put((word, time.perf_counter()))
        finally:
            # None ends the iteration, after an error too.
            arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    yield from iter(arrived.get, None)


def sentences_of(
    words: Iterator[tuple[str, float]], known: list[str] | None, name: str
) -> Iterator[tuple[str, float]]:
    """Sentences as they become complete, each with the time of the last word so far.

    Args:
        words: words with their times, as `arrive` gives them.
        known: the sentences of a file; None where they are to be found.
        name: the text's name, for errors.

    Raises:
        DataError: there is no sentence, or only one that does not end.
    """
    if known is None:
        yield from found_sentences(words, name)
        return
    for sentence in known:
        times = [next(words)[1] for _ in sentence.split()]
        yield sentence, times[-1]


def found_sentences(words: Iterator[tuple[str, float]], name: str) -> Iterator[tuple[str, float]]:
    from rollouts.data.sentences import split_sentences

    text = ""
    arrived = 0.0
    found = False
    for word, arrived in words:
        text += word
        # A quotation may go on over several sentences.
        in_quotation = text.count('"') % 2 or text.count("“") > text.count("”")
        if in_quotation:
            continue
        *complete, last = split_sentences(text) or [""]
        for sentence in complete:
            found = True
            yield sentence, arrived
        white_space = text[len(text.rstrip()) :]
        text = last + white_space
    if not found and not text:
        raise DataError(f"{name}: the text is empty; nothing follows the question")
    if not found:
        check_sentence_end(text.strip(), name)
    for sentence in split_sentences(text):
        yield sentence, arrived


def watch(config, text: Text, seconds: float) -> None:
    """Read, think and answer, and print all of it.

    Args:
        seconds: the time between words.

    Raises:
        ModelError: the model cannot be loaded, or has no protocol tokens.
        DataError: the text is empty, longer than the context, or holds a protocol token.
    """
    from rewards.metrics.latency import to_answer
    from rollouts.data.marks import SKIP

    reader = LiveReader(config, text)
    show(f"? {text.question}\n")
    words = arrive(text.words, seconds)
    last_word_time = time.perf_counter()
    thoughts = []
    for sentence, arrived in sentences_of(words, text.sentences, text.name):
        last_word_time = arrived
        reader.read(sentence)
        show(f"{sentence}\n    ")
        thought, _ = reader.write()
        thoughts.append(thought)
    show("    ")
    deep, times = reader.write(deep=True)
    skipped = thoughts.count([reader.protocol.skip])
    answer_time = times[to_answer(deep, reader.protocol.eor) - 1]
    show(
        f"{len(thoughts)} sentences, {skipped} {SKIP}; "
        f"{sum(map(len, thoughts))} tokens streamed, {len(deep)} deep; "
        f"answer {answer_time - last_word_time:.2f} s after the last word\n"
    )


class LiveReader:
    """A model that reads a text sentence by sentence, and prints what it writes."""

    def __init__(self, config, text: Text):
        import torch
        from transformers.utils.logging import disable_progress_bar

        from rollouts.streaming.tokens import Protocol
        from trainers.core.policy import DTYPES, check_model
        from trainers.core.rollout import make_engine
        from trainers.modes import reading_mode

        disable_progress_bar()
        self.config = config
        self.text = text
        self.sentences_read = 0
        self.tokenizer, self.model_config = check_model(
            "model", config.model.path, config.model.trust_remote_code
        )
        self.protocol = Protocol.of(self.tokenizer)
        if text.sentences is not None:
            # A file's length is known, so a text that is too long fails before the weights load.
            self.check_room(len(self.prompt(text.sentences).token_ids), 0)
        self.sampling = reading_mode(config).sampling(
            self.tokenizer,
            [*self.tokenizer.stop_ids, *config.rollout.stop_ids],
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        engine = make_engine(config, device, DTYPES[config.model.dtype], 0)
        self.live = engine.live(self.sampling, config.seed)

    def prompt(self, sentences: Iterable[str]):
        """The prompt of the question and these sentences."""
        from rollouts.data.examples import Example
        from rollouts.streaming.prompts import streaming_prompts

        question = self.text.question
        example = Example(
            0,
            [{"role": "user", "content": question}],
            sentences=tuple(sentences),
            question=question,
        )
        prompts, _ = streaming_prompts([example], self.tokenizer, self.config, self.text.name)
        return prompts[0]

    def check_room(self, source_length: int, target_length: int) -> None:
        """Raises DataError: source and target are longer than the model's context."""
        from rollouts.pretrained import context_length

        context = context_length(self.model_config)
        # Target tokens have positions of their own, which begin at the offset.
        end = self.config.streaming.target_offset + target_length
        if context and max(source_length, end) > context:
            raise DataError(
                f"{self.text.name}: text and thoughts are longer than the model's context of "
                f"{context} tokens; give a shorter text"
            )

    def read(self, sentence: str) -> None:
        """Feed the next sentence to the model.

        Raises:
            DataError: it does not fit the context, or holds a protocol token.
        """
        prompt = self.prompt([sentence])
        if self.sentences_read == 0:
            # What comes before the first sentence is fed with it: instructions and the question.
            parts = zip_longest(prompt.segments, prompt.opening, fillvalue=())
        else:
            parts = [(prompt.segments[-1], ())]
        longest = self.sampling.max_thought_tokens + self.sampling.max_new_tokens
        for segment, forced in parts:
            source_length = self.live.read + len(segment)
            self.check_room(source_length, self.live.wrote + len(forced) + longest)
            self.live.feed(segment)
            if forced:
                self.live.force(forced)
        self.sentences_read += 1

    def write(self, deep: bool = False) -> tuple[list[int], list[float]]:
        """Print a thought, or the deep segment with the answer, as its tokens come.

        Returns:
            the tokens, and the times at which they came.
        """
        stop_ids = self.sampling.stop_ids if deep else self.sampling.thought_stops
        # The token that skips a thought is shown, though it ends the thought.
        hidden = set(stop_ids) - {self.protocol.skip}
        printer = TokenPrinter(self.tokenizer, hidden, THOUGHT_STYLE)
        answering = False
        ids, times = [], []
        for token, _, _ in self.live.write(deep):
            times.append(time.perf_counter())
            ids.append(token)
            if deep and token == self.protocol.eor and not answering:
                answering = True
                printer.flush()
                show("\n= ")
                printer = TokenPrinter(self.tokenizer, hidden, ANSWER_STYLE)
            else:
                printer.add(token)
        printer.flush()
        show("\n")
        return ids, times


class TokenPrinter:
    """Prints a text whose tokens come one by one."""

    def __init__(self, tokenizer, hidden: Collection[int], style: int):
        self.tokenizer = tokenizer
        self.hidden = hidden
        self.style = style
        self.ids: list[int] = []
        self.text = ""
        self.printed = 0  # characters

    def add(self, token: int) -> None:
        if token not in self.hidden:
            self.ids.append(token)
        # All of it is decoded anew: a token's text depends on the tokens before it.
        self.text = self.tokenizer.decode(self.ids)
        # A replacement sign at the end: the rest of a character is still to come.
        if not self.text.endswith("\ufffd"):
            self.flush()

    def flush(self) -> None:
        """Print the rest, be it a part of a character."""
        show(self.text[self.printed :], self.style)
        self.printed = len(self.text)


def show(text: str, style: int = 0) -> None:
    """Print at once; styles are for terminals."""
    if style and text and sys.stdout.isatty():
        text = f"\x1b[{style}m{text}\x1b[0m"
    print(text, end="", flush=True)


if __name__ == "__main__":
    launch(main)
