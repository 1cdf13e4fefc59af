"""Writes an offline cache of a teacher, shard by shard (trainers/core/teacher_cache.py has the
form).

A file is written aside, brought through to the disk, and then gets its name. After each, the
manifest is written anew. So a cache that was cut short goes on with the shards that it lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kernels
from recipes.embedded import model_folder
from recipes.errors import ConfigError, DataError, one_line
from rollouts.trajectory import Trajectory
from trainers.core.files import WRITE_ERROR, checksums, flush, text_checksum
from trainers.core.scoring import head_options
from trainers.core.teacher import as_teacher_reads, resolved
from trainers.core.teacher_cache import (
    FORM,
    MANIFEST,
    ROWS,
    Rows,
    file_names,
    manifest_text,
    read_manifest,
    rows_of,
    shard_name,
    vocabulary_checksum,
)

# Facts that may differ between two attempts at one cache: its teacher or data lies elsewhere.
PLACES = ("teacher.path", "data.path")
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class CacheWriter:
    """A cache in a folder, new or continued.

    Args:
        folder: it is made.
        facts: what the manifest says beside the files, as `facts_of` has them.
        rows: of the data.

    Raises:
        ConfigError: the folder has another cache or other files, or another process writes there.
        DataError: it cannot be written to.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], rows: Rows):
        self.folder, self.facts, self.rows = folder, dict(facts), rows
        self.where = f"out={folder}"
        self._write(lambda: folder.mkdir(parents=True, exist_ok=True))
        self._check_ours()
        self.lock = self._lock()
        self.files = self._found()
        if ROWS not in self.files:
            # First, so that a folder with any file of a cache is known as one.
            self._save_manifest()
            self._save_tensors(ROWS, vars(rows))

    def _check_ours(self) -> None:
        others = [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]
        if others and MANIFEST not in others:
            raise ConfigError(
                f"{self.where} has {min(others)}, and no {MANIFEST}, so it is no cache; name "
                "another folder"
            )

    def _lock(self):
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / ".lock")
        try:
            self._write(lambda: lock.acquire(blocking=False))
        except Timeout:
            raise ConfigError(
                f"{self.where}: another process writes there; wait, or name another folder"
            ) from None
        return lock

    def _found(self) -> dict[str, list]:
        """Bytes and checksum of the files that an earlier attempt finished.

        What it left half-written is removed.
        """
        for path in self.folder.glob(".*.partial"):
            path.unlink()
        if not (self.folder / MANIFEST).exists():
            return {}
        manifest = read_manifest(self.where, self.folder)
        listed = manifest.pop("files")
        self._check_same(manifest)
        names = [name for name in listed if (self.folder / name).is_file()]
        found = checksums([self.folder / name for name in names])
        return {name: entry for name, entry in zip(names, found) if entry == listed[name]}

    def _check_same(self, manifest: dict[str, Any]) -> None:
        theirs, ours = flat(manifest), flat(self.facts)
        for name in (*ours, *theirs):
            if name not in PLACES and theirs.get(name) != ours.get(name):
                raise ConfigError(
                    f"{self.where} is a cache of another {name}: {theirs.get(name)}, and this one "
                    f"has {ours.get(name)}; name another folder, or delete it"
                )

    def missing(self) -> list[int]:
        """The numbers of the shards that are to be written."""
        names = file_names(len(self.rows.index), self.facts["shard_rows"])[1:]
        return [number for number, name in enumerate(names) if name not in self.files]

    def members(self, number: int) -> slice:
        """The rows of a shard."""
        size = self.facts["shard_rows"]
        return slice(number * size, (number + 1) * size)

    def save(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """Write a shard.

        Args:
            number: of the shard.
            trajectories: its rows, with the annotations that `score` writes.

        Raises:
            DataError: it cannot be written.
        """
        parts = [trajectory.annotations for trajectory in trajectories]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        tensors = {
            "targets": np.concatenate([t.completion_ids for t in trajectories]).astype(np.int32),
            "target_logprobs": joined["teacher_logprobs"],
        }
        if self.facts["top_k"]:
            tensors["topk_ids"] = joined["teacher_topk_ids"].astype(np.int32)
            tensors["topk_logprobs"] = joined["teacher_topk_logprobs"]
        self._save_tensors(shard_name(number), tensors)

    def _save_tensors(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        self._save(name, lambda path: save_file(tensors, path))
        self.files[name] = checksums([self.folder / name])[0]
        self._save_manifest()

    def _save_manifest(self) -> None:
        text = manifest_text({**self.facts, "files": dict(sorted(self.files.items()))})
        self._save(MANIFEST, lambda path: path.write_text(text, "utf-8"))

    def _save(self, name: str, write: Callable[[Path], Any]) -> None:
        aside = self.folder / f".{name}.partial"

        def save() -> None:
            write(aside)
            flush(aside)
            aside.replace(self.folder / name)
            flush(self.folder)

        self._write(save)

    def _write(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            # filelock's Timeout is an OSError.
            if isinstance(error, TimeoutError) or not (
                isinstance(error, OSError) or WRITE_ERROR.search(str(error))
            ):
                raise
            raise DataError(
                f"{self.where} cannot be written to ({one_line(error)}); make room or give access, "
                "and run the same command again"
            ) from error


def facts_of(run, rows: Rows, top_k: int, shard_rows: int) -> dict[str, Any]:
    """What the manifest of a cache says beside its files.

    Args:
        run: a `Run` (trainers/run.py) with a teacher in its config, prepared.
        rows: of its data.
        top_k: 0: the data's tokens alone.
        shard_rows: the number of rows of a shard.
    """
    teacher, prompts = resolved(run.config.teacher, run.config.model), run.teacher_prompts
    read = [(index, ids, ()) for index, ids in prompts.items()]
    return {
        "form": FORM,
        "teacher": {
            "path": teacher.path,
            "weights": weights_checksum(teacher.path, teacher.trust_remote_code),
            "dtype": teacher.dtype,
            "prompts": rows_of(read).checksum() if prompts else None,
        },
        "vocabulary": {
            "checksum": vocabulary_checksum(run.tokenizer),
            "size": run.vocab,
            "missing": list(run.missing),
            "stop_ids": list(run.stop_ids),
            "teacher_end": run.teacher_stop,
        },
        "temperature": 1.0,
        "top_k": top_k,
        "data": {
            "path": run.config.data.path,
            "rows": len(rows.index),
            "tokens": int(rows.length.sum()),
            "checksum": rows.checksum(),
        },
        "shard_rows": shard_rows,
    }


def weights_checksum(path: str, trust_remote_code: bool) -> str:
    """Of a model folder's weights and config; of a hub model, its commit."""
    folder = Path(model_folder(path))
    if not folder.is_dir():
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)._commit_hash
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    entries = dict(zip((file.name for file in files), checksums(files)))
    return text_checksum(json.dumps(entries, sort_keys=True))


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts by dotted names."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def score(teacher, run, trajectories: Sequence[Trajectory], top_k: int) -> None:
    """Write the annotations of `TeacherCache.read`, as the teacher in process has them.

    Args:
        teacher: a `FrozenModel` (trainers/core/teacher.py).
        run: with what the teacher reads in place of the prompts.
        trajectories: rows of the data.
        top_k: 0: `teacher_logprobs` alone.
    """
    head = teacher.policy.head
    teacher.write(as_teacher_reads(run, trajectories), partial(scores, head, top_k, run.vocab))


def scores(head, top_k: int, vocab: int, hidden: torch.Tensor, batch) -> dict[str, torch.Tensor]:
    """Log-probs of the targets [T], and the K most likely tokens with theirs [T, K], in nats.

    They are at temperature 1.

    Args:
        head: the teacher's.
        top_k: K.
        vocab: ids at and past it are padding rows.
        hidden: [T, H].
        batch: a `MicroBatch`.
    """
    options = head_options(head, 1.0, vocab)
    of_targets = kernels.fused_linear_logprobs(hidden, head.weight, batch.targets, **options)
    found = {"teacher_logprobs": of_targets.logprobs.float()}
    if top_k:
        likely = kernels.fused_linear_topk_logprobs(hidden, head.weight, top_k, **options)
        found["teacher_topk_ids"] = likely.ids
        found["teacher_topk_logprobs"] = likely.logprobs.float()
    return found


def fill(
    writer: CacheWriter,
    run,
    teacher: Callable[[], Any],
    read: Callable[[slice], list[Trajectory]],
    finished: Callable[[int], None] = lambda rows: None,
) -> None:
    """Score and write the shards that a cache lacks.

    Args:
        run: a `Run` (trainers/run.py).
        teacher: loads it; called where a shard is missing.
        read: the trajectories of some of the rows.
        finished: is told how many rows were written.
    """
    scorer, missing = None, writer.missing()
    for number in missing:
        scorer = scorer or teacher()
        trajectories = read(writer.members(number))
        score(scorer, run, trajectories, writer.facts["top_k"])
        writer.save(number, trajectories)
        finished(len(trajectories))
