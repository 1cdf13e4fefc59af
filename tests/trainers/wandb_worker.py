"""Run by test_wandb.py: the records of some steps, as a run writes them.

Usage: wandb_worker.py VARIABLES FOLDER START LAST END KEY=VALUE …. VARIABLES is JSON: what the
environment has of W&B. The steps are those after START up to LAST of a run that continues after
START, with an evaluation at each even one. END is `finished` or `killed`; a run that is killed
closes nothing."""

import json
import os
import sys
import time
from pathlib import Path


def main(folder: Path, start: int, last: int, end: str, keys: list[str]) -> None:
    from recipes.compose import compose
    from trainers.core.tracking import Tracker

    config = compose([f"run.dir={folder}", "eval.k=1", *keys])
    tracker = Tracker(config, folder, start, lambda scores: "")
    names = ("time/step", "train/loss", "train/grad_norm", "perf/tokens_per_second")
    for step in range(start + 1, last + 1):
        tracker.step({"step": step, **{name: float(step) for name in names}, "attempt": start})
        row = {"step": step, "prompt": "p", "completion": f"c{step}", "answer": "1"}
        row |= {"reward": 0.5, "correct": True}
        tracker.completions_file.write(json.dumps(row) + "\n")
        if step % 2 == 0:
            scores = {"avg@1": step / 100, "pass@1": 0, "length_mean": 1, "truncated_frac": 0}
            tracker.evaluation(step, scores, "data", 1.0)
    if end == "killed":
        time.sleep(1)
        os._exit(9)
    tracker.finish()


if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ |= json.loads(sys.argv[1])
    main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6:])
