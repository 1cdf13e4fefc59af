"""Turns a name, a file or a folder into examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from recipes.errors import DataError
from recipes.schema import DataConfig
from rollouts.data.columns import row_examples
from rollouts.data.examples import Example
from rollouts.data.readers import sources
from rollouts.data.stories import stories, story
from rollouts.data.translation import translation


def load_examples(
    path: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    difficulty: int | None = None,
    verbose: bool = False,
    distractors: int = 0,
    varied: bool = False,
) -> Sequence[Example]:
    """The examples of a data set.

    Args:
        path: `stories` or `translation`; a .jsonl, .json (SQuAD's too), .parquet or .csv file, or a
            folder of them (searched in depth); a folder without these, of line-aligned text
            (`rollouts.data.parallel_text`), or FOLDER/NAME of its files NAME.LANG; or a Hugging Face dataset,
            as `name` or `name:config`.
        split: of generated data or the Hugging Face dataset. In a folder, files whose name or
            subfolder says another split (train, validation, test, …) are left out; a file given by
            itself is taken whole.
        prompt_column, answer_column: a column, or a dotted path into one; None: found by name, as
            `rollouts.data.columns` says. A column named here whose text has neither `####` nor a box is taken as
            the answer itself.
        target_column: the column of the text to write; it is answer and solution, whatever else the
            row has.
        limit: the first rows only.
        seed, size: of the stories and the translation; difficulty, verbose, distractors, varied: of
            the stories (`rollouts.data.stories.story`). None for the size and the difficulty: the
            defaults of `data.stories` and `data.difficulty`.

    Raises:
        DataError: one line that says what is wrong with which file and row.
    """
    if path in ("stories", "translation"):
        size = DataConfig.stories if size is None else size
        size = size if limit is None else min(size, limit)
        if path == "translation":
            return _translations(size, seed, split)
        difficulty = DataConfig.difficulty if difficulty is None else difficulty
        return _stories(
            size, seed, split, difficulty, verbose=verbose, distractors=distractors, varied=varied
        )
    examples: list[Example] = []
    for source, rows in sources(path, split):
        left = None if limit is None else limit - len(examples)
        if left == 0:
            break
        examples += row_examples(
            source,
            list(islice(rows, left)),
            prompt_column,
            answer_column,
            target_column,
            len(examples),
        )
    if not examples:
        raise DataError(f"{path}: there are no rows in it; give data with at least one")
    return examples


def configured_examples(data, seed: int, path: str | None = None, **changes) -> Sequence[Example]:
    """`load_examples` with the options of a config's section `data`, but for `path` and
    `changes`."""
    options = {
        "split": data.split,
        "prompt_column": data.prompt_column,
        "answer_column": data.answer_column,
        "target_column": data.target_column,
        "limit": data.limit,
        "size": data.stories,
        "difficulty": data.difficulty,
        "verbose": data.verbose,
        "distractors": data.distractors,
        "varied": data.varied,
    }
    return load_examples(path or data.path, seed=seed, **options | changes)


class Generated(Sequence[Example]):
    """Examples that are made each time they are looked at, by a function of their index."""

    def __init__(self, count: int, make: Callable[[int], Example]):
        self.count, self.make = count, make
        if count:
            make(0)  # wrong arguments are an error here, not at the first use

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        chosen = range(self.count)[index]  # negative numbers and IndexError as in a list
        return [self.make(i) for i in chosen] if isinstance(chosen, range) else self.make(chosen)


def _stories(count: int, seed: int, split: str, difficulty: int, **options) -> Generated:
    """Those for training are made when they are looked at; held-out ones, which are all different,
    at once."""
    held_out = (
        None
        if split == "train"
        else stories(count, seed=seed, split=split, difficulty=difficulty, **options)
    )

    def example(index: int) -> Example:
        made = held_out[index] if held_out else story(seed, index, split, difficulty, **options)
        return Example(
            index,
            [{"role": "user", "content": made.prompt}],
            made.answer,
            made.solution,
            made.sentences,
            made.thoughts,
            made.question,
            made.final,
            made.deep,
        )

    return Generated(count, example)


def _translations(count: int, seed: int, split: str) -> Generated:
    def example(index: int) -> Example:
        made = translation(seed, index, split)
        return Example(index, [{"role": "user", "content": made.source}], made.target, made.target)

    return Generated(count, example)
