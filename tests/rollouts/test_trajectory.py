"""Annotations: a name that no loss reads is an error when it is written, not silence."""

import re
from pathlib import Path

import numpy as np
import pytest

from recipes.errors import AnnotationError
from rollouts.trajectory import ANNOTATIONS, Trajectory

ROOT = Path(__file__).resolve().parents[2]


def trajectory() -> Trajectory:
    return Trajectory(0, 0, [1], [2, 3], "stop")


def test_an_unknown_annotation_names_the_nearest_one():
    with pytest.raises(AnnotationError, match="no annotation 'advantage'; did you mean 'advant"):
        trajectory().annotations["advantage"] = np.ones(2, np.float32)
    with pytest.raises(AnnotationError, match="no annotation 'masks'"):
        trajectory().annotations |= {"masks": np.ones(2, bool)}
    with pytest.raises(AnnotationError, match="no annotation 'masks'"):
        trajectory().annotations.update({"masks": np.ones(2, bool)})


def test_another_dtype_is_an_error():
    with pytest.raises(AnnotationError, match="'advantages' must be float32, it is float64"):
        trajectory().annotations["advantages"] = np.ones(2)


def test_known_annotations_are_kept():
    written = trajectory()
    written.annotations["mask"] = np.ones(2, bool)
    written.annotations |= {"advantages": np.ones(2, np.float32)}
    assert set(written.annotations) == {"mask", "advantages"}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_every_annotation_of_the_table_is_used(name):
    sources = [
        path for folder in ("trainers", "rollouts") for path in (ROOT / folder).rglob("*.py")
    ]
    users = [p.name for p in sources if re.search(rf'"{name}"', p.read_text())]
    assert len(users) > 1, users
