"""The keys of distillation from a teacher whose log-probs are in files."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.schema.common import Config
from recipes.schema.keys import key


@dataclass(frozen=True)
class CachedTeacherConfig:
    cache: str | None = key(
        None,
        "Folder that `python -m scripts.cache_teacher` wrote: the teacher's log-probs of the "
        "data's solutions. No teacher is loaded.",
    )


@dataclass(frozen=True)
class OfflineDistillation(Config):
    """The config of a run that distils from a cache."""

    teacher: CachedTeacherConfig = field(default_factory=CachedTeacherConfig)
