"""Turns the name of a data set, a file or a folder into examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from recipes.errors import DataError
from recipes.schema import DataConfig
from rollouts.data.columns import NamedColumns, row_examples
from rollouts.data.examples import Example
from rollouts.data.readers import sources
from rollouts.data.stories import Story, stories, story
from rollouts.data.translation import translation


def load_examples(
    path: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    target_column: str | None = None,
    teacher_column: str | None = None,
    route_column: str | None = None,
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
        path: one of
            - `stories` or `translation`, which are generated;
            - a .jsonl, .json (also SQuAD's), .csv or .tsv file, each also with .gz, or a .parquet
              or .arrow file;
            - a folder of these, searched in depth, or one of `save_to_disk`;
            - a folder of line-aligned text, or FOLDER/NAME of its files NAME.LANG
              (`rollouts.data.parallel_text`);
            - a Hugging Face dataset, as `name` or `name:config`.
        split: of generated data or the Hugging Face dataset. In a folder, files are left out whose
            name or subfolder says another split (train, validation, test, …). A file that is
            named by itself is taken whole.
        prompt_column, answer_column: a column, or a dotted path into one. None: found by name, as
            `rollouts.data.columns` says. The text of an answer column that is named here is the
            answer itself, where it has neither `####` nor a box.
        target_column: the column of the text to write. It is answer and solution, whatever else
            the row has.
        teacher_column: the column of the prompt that a teacher reads.
        route_column: the column that names the teacher of a row.
        limit: the number of rows to take, from the first on. None: all.
        seed: of generated data.
        size: the number of generated examples. None: the default of `data.stories`.
        difficulty, verbose, distractors, varied: of the stories (`rollouts.data.stories.story`).
            None for the difficulty: the default of `data.difficulty`.

    Raises:
        DataError: one line that says what is wrong with which file and row.
    """
    if path in ("stories", "translation"):
        if teacher_column is not None:
            raise DataError(
                f"data.path={path} is generated and has no columns (teacher.prompt_column="
                f"{teacher_column}); use teacher.prompt"
            )
        if route_column is not None:
            raise DataError(
                f"data.path={path} is generated and has no columns (teacher.route="
                f"{route_column}); write it to a file with one, or let all teachers score all rows"
            )
        count = DataConfig.stories if size is None else size
        count = count if limit is None else min(count, limit)
        if path == "translation":
            return _translations(count, seed, split)
        difficulty = DataConfig.difficulty if difficulty is None else difficulty
        return _stories(
            count, seed, split, difficulty, verbose=verbose, distractors=distractors, varied=varied
        )
    named = NamedColumns(prompt_column, answer_column, target_column, teacher_column, route_column)
    return _read_examples(path, split, named, limit)


def configured_examples(data, seed: int, path: str | None = None, **changes) -> Sequence[Example]:
    """`load_examples` with the options of a config.

    Args:
        data: the section `data` of a config.
        seed: of generated data.
        path: in place of `data.path`.
        changes: options of `load_examples` in place of the config's.

    Raises:
        DataError: as `load_examples`.
    """
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


def _read_examples(
    path: str, split: str, named: NamedColumns, limit: int | None
) -> Sequence[Example]:
    examples: list[Example] = []
    for source, rows in sources(path, split):
        room = None if limit is None else limit - len(examples)
        if room == 0:
            break
        examples += row_examples(source, islice(rows, room), named, len(examples))
    if not examples:
        raise DataError(f"{path}: there are no rows in it; give data with at least one")
    return examples


class Generated(Sequence[Example]):
    """Examples that are computed each time they are looked at.

    Args:
        count: the number of examples.
        make: an example from its index.
    """

    def __init__(self, count: int, make: Callable[[int], Example]):
        self.count = count
        self.make = make
        if count:
            # Wrong arguments of the generator are an error here, not at the first use.
            make(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        # A range takes negative numbers and slices, and raises IndexError, as a list does.
        place = range(self.count)[index]
        if isinstance(place, range):
            return [self.make(i) for i in place]
        return self.make(place)


def _stories(count: int, seed: int, split: str, difficulty: int, **options) -> Generated:
    if split == "train":

        def example(index: int) -> Example:
            return _story_example(index, story(seed, index, split, difficulty, **options))
    else:
        # Each held-out story differs from those before it, so they are drawn together.
        held_out = stories(count, seed=seed, split=split, difficulty=difficulty, **options)

        def example(index: int) -> Example:
            return _story_example(index, held_out[index])

    return Generated(count, example)


def _story_example(index: int, source: Story) -> Example:
    return Example(
        index,
        messages=[{"role": "user", "content": source.prompt}],
        answer=source.answer,
        solution=source.solution,
        sentences=source.sentences,
        thoughts=source.thoughts,
        question=source.question,
        final=source.final,
        deep=source.deep,
    )


def _translations(count: int, seed: int, split: str) -> Generated:
    def example(index: int) -> Example:
        pair = translation(seed, index, split)
        messages = [{"role": "user", "content": pair.source}]
        return Example(index, messages, answer=pair.target, solution=pair.target)

    return Generated(count, example)
