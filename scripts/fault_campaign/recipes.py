"""The recipes, as short runs of the embedded models: those of the golden curves, and shorter."""

from __future__ import annotations

from pathlib import Path

from benchmarks.golden import COMMON, RUNS, with_inputs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = tuple(sorted(path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")))
SHORT = {
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "eval.every": 1,
    "eval.size": 4,
    "log.completions": 64,
}
# vLLM takes half a minute to start, and draws the same in each run.
OTHER_ENGINE = {"onpolicy_sft_paper": "hf", "adasr_paper": "hf"}


def overrides(recipe: str, folder: Path) -> list[str]:
    """The overrides of a recipe's run; data that it needs is written to `folder`."""
    keys = {"recipe": recipe} | COMMON | RUNS[recipe] | SHORT
    if recipe in OTHER_ENGINE:
        keys["rollout.engine"] = OTHER_ENGINE[recipe]
    return [f"{key}={value}" for key, value in with_inputs(keys, folder / "frames").items()]
