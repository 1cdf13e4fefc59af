"""An offline cache: a teacher's log-probs of the data's own solutions, in files.

A folder holds (R rows of the data, T tokens of the targets of a shard, log-probs in nats):

    manifest.json         what was scored by which teacher; bytes and checksum of each other file
    rows.safetensors      index [R] int64, length [R] int64 of the target, digest [R, 16] uint8
    shard_N.safetensors   of `shard_rows` rows, end to end: targets [T] int32,
                          target_logprobs [T] float32, and with top_k = K > 0
                          topk_ids [T, K] int32, topk_logprobs [T, K] float32, descending

A row's digest is that of its ids: the prompt's as the student reads it, and the target's. A cache
serves any data whose rows are among its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import ConfigError, DataError, ModelError, one_line
from rollouts.trajectory import Trajectory
from trainers.core.files import checksums, text_checksum

FORM = 1
MANIFEST, ROWS = "manifest.json", "rows.safetensors"
AGAIN = "run its python -m scripts.cache_teacher again, which makes what is missing"


@dataclass(frozen=True)
class Rows:
    """The rows of data, in their order.

    Attributes:
        index: [R] int64, as the data counts them.
        length: [R] int64, tokens of the target.
        digest: [R, 16] uint8.
    """

    index: np.ndarray
    length: np.ndarray
    digest: np.ndarray

    def checksum(self) -> str:
        """Of all rows."""
        parts = (self.index, self.length, self.digest)
        return hashlib.blake2b(b"".join(part.tobytes() for part in parts)).hexdigest()[:32]


def rows_of(entries: Iterable[tuple[int, Sequence[int], Sequence[int]]]) -> Rows:
    """The rows with these (index, ids of the prompt, ids of the target)."""
    index, length, digests = [], [], []
    for row, prompt, target in entries:
        index.append(row)
        length.append(len(target))
        digests.append(digest(prompt, target))
    return Rows(
        np.array(index, dtype=np.int64),
        np.array(length, dtype=np.int64),
        np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16),
    )


def digest(prompt: Sequence[int], target: Sequence[int]) -> bytes:
    """16 bytes that stand for a prompt and its target."""
    ids = np.array([len(prompt), *prompt, *target], dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def vocabulary_checksum(tokenizer) -> str:
    """Of the tokens and their ids."""
    return text_checksum(json.dumps(sorted(tokenizer.get_vocab().items())))


def shard_name(number: int) -> str:
    """Of shard 0, 1, …"""
    return f"shard_{number:05d}.safetensors"


def file_names(rows: int, shard_rows: int) -> list[str]:
    """All files of a cache but its manifest."""
    return [ROWS, *(shard_name(number) for number in range(-(-rows // shard_rows)))]


def manifest_text(manifest: dict[str, Any]) -> str:
    """What is written of a manifest, with its own checksum."""
    checksum = text_checksum(json.dumps(manifest, sort_keys=True))
    return json.dumps({**manifest, "checksum": checksum}, indent=1)


def read_manifest(where: str, folder: Path) -> dict[str, Any]:
    """What a cache's manifest says.

    Args:
        where: the key with its value, for messages.
        folder: the cache's.

    Raises:
        DataError: it cannot be read, was changed, or is of another form.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        checksum = manifest.pop("checksum")
        if checksum != text_checksum(json.dumps(manifest, sort_keys=True)):
            raise ValueError("its own checksum differs, so it was changed")
        form = manifest["form"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: {folder / MANIFEST} cannot be read ({one_line(error)}); delete the folder, "
            "and cache the teacher anew"
        ) from error
    if form != FORM:
        raise DataError(
            f"{where} has form {form}, and this version reads form {FORM}; cache the teacher anew"
        )
    return manifest


class TeacherCache:
    """A teacher whose log-probs are read from the files of `teacher.cache`.

    Files stay mapped, and a step reads the rows that it takes.

    Raises:
        ConfigError: there is no cache in the folder.
        DataError: it is not whole; the message names the file.
    """

    def __init__(self, folder: Path):
        self.where, self.folder = f"teacher.cache={folder}", folder
        if not (folder / MANIFEST).is_file():
            raise ConfigError(
                f"{self.where}: there is no {MANIFEST}; name a folder that python -m "
                "scripts.cache_teacher wrote"
            )
        self.manifest = read_manifest(self.where, folder)
        self.top_k: int = self.manifest["top_k"]
        self.shard_rows: int = self.manifest["shard_rows"]
        self._check_files()
        tensors = self._open(ROWS)
        self.rows = Rows(*(tensors.get_tensor(name) for name in ("index", "length", "digest")))
        self.places = {int(index): place for place, index in enumerate(self.rows.index)}
        self.starts = np.concatenate([[0], np.cumsum(self.rows.length)])
        # By number, as they are opened.
        self.shards: dict[int, Any] = {}

    @property
    def whole(self) -> bool:
        """Whether each token of the vocabulary is in the top k."""
        vocabulary = self.manifest["vocabulary"]
        return self.top_k == vocabulary["size"] - len(vocabulary["missing"])

    def scores_end(self, end: int) -> bool:
        """Whether what the cache has at a final `end` says how likely it is to end there.

        Without top-k that is the log-prob of `end`, and a teacher may end on another token.
        """
        return self.top_k > 0 or end == self.manifest["vocabulary"]["teacher_end"]

    @property
    def described(self) -> str:
        """The teacher, in words."""
        teacher, kept = self.manifest["teacher"], "the data's tokens alone"
        if self.top_k:
            kept = f"the {self.top_k} most likely tokens"
        return f"{teacher['path']} {teacher['dtype']}, cached: {kept} of {len(self.places)} rows"

    def _open(self, name: str):
        from safetensors import safe_open

        return safe_open(self.folder / name, framework="numpy")

    def _check_files(self) -> None:
        listed = self.manifest["files"]
        names = file_names(self.manifest["data"]["rows"], self.shard_rows)
        made = sum(name in listed for name in names)
        if made < len(names):
            raise DataError(
                f"{self.where} is not finished: it has {made} of {len(names)} files; {AGAIN}"
            )
        for name in names:
            if not (self.folder / name).is_file():
                raise DataError(f"{self.where}: {name} is missing; {AGAIN}")
        found = checksums([self.folder / name for name in names])
        for name, entry in zip(names, found):
            if entry != listed[name]:
                raise DataError(f"{self.where}: {name} is corrupt (its checksum differs); {AGAIN}")

    def check_vocabulary(self, run) -> None:
        """Compare the vocabularies, and leave out of the student's what the teacher lacks.

        A completion ends on the teacher's stop tokens too, as the student learns to write these.

        Args:
            run: a `Run` (trainers/run.py) with its tokenizer.

        Raises:
            ModelError: they differ.
        """
        known, model = self.manifest["vocabulary"], run.config.model.path
        if vocabulary_checksum(run.tokenizer) != known["checksum"]:
            raise ModelError(
                f"{self.where} is of another vocabulary than model.path={model}; cache the teacher "
                f"anew with model={model}"
            )
        if run.vocab < known["size"]:
            raise ModelError(
                f"{self.where} has probabilities of {known['size']} tokens, and the head of "
                f"model.path={model} has {run.vocab}; cache the teacher anew with model={model}"
            )
        run.vocab = known["size"]
        ids = {*run.missing, *known["missing"]}
        run.missing = tuple(sorted(id for id in ids if id < run.vocab))
        run.stop_ids = tuple(dict.fromkeys([*run.stop_ids, *known["stop_ids"]]))

    def check_rows(self, rows: Rows, data: str) -> None:
        """Compare the cache with the run's data.

        Args:
            rows: those of the data.
            data: its path.

        Raises:
            DataError: the cache lacks a row, or has another one in its place; the first is named.
        """
        for row, own in zip(rows.index.tolist(), rows.digest):
            place = self.places.get(row)
            if place is None:
                raise DataError(
                    f"{self.where} has {len(self.places)} rows, and row {row} of data.path={data} "
                    "is not among them; cache the teacher on this data, with the same data.… keys"
                )
            if not np.array_equal(own, self.rows.digest[place]):
                raise DataError(
                    f"{self.where}: row {row} of data.path={data} has another prompt or solution "
                    "than the row that was cached; cache the teacher on this data, with the same "
                    "data.… keys and chat template"
                )

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write what the cache has of each token.

        They are `teacher_logprobs` [T] float32, `teacher_topk_ids` [T, K] int64 and
        `teacher_topk_logprobs` [T, K] float32, nats at temperature 1. Without top-k, K is 1 and the
        id is the data's token.

        Args:
            trajectories: rows of the data with their targets.
        """
        for trajectory in trajectories:
            trajectory.annotations |= self.read(trajectory.prompt_index)

    def read(self, row: int) -> dict[str, np.ndarray]:
        """The annotations of a row of the data."""
        place = self.places[row]
        number = place // self.shard_rows
        if number not in self.shards:
            self.shards[number] = self._open(shard_name(number))
        first = self.starts[number * self.shard_rows]
        tokens = slice(int(self.starts[place] - first), int(self.starts[place + 1] - first))

        def part(name: str) -> np.ndarray:
            return self.shards[number].get_slice(name)[tokens]

        logprobs = part("target_logprobs")
        if self.top_k:
            ids, topk = part("topk_ids"), part("topk_logprobs")
        else:
            ids, topk = part("targets")[:, None], logprobs[:, None]
        return {
            "teacher_logprobs": logprobs,
            "teacher_topk_ids": ids.astype(np.int64),
            "teacher_topk_logprobs": topk,
        }
