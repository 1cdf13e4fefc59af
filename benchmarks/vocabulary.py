"""Peak memory of a whole PowerOPD run with a large vocabulary, beside the same run with naive
losses.

    python -m benchmarks.vocabulary [--vocab 151936] [--steps 3] [overrides of recipe=poweropd …]

Two models with random weights and V tokens, all of them valid, are made in a temporary folder.
alpha is 0.1, so that their small probabilities give rewards that are not all 0. Each run is a
process of its own; its peak is the operating system's count (VmHWM) of resident memory. "none"
trains nothing: it is what the run needs anyway, the sampler included. Naive is [T, V] float32
logits, their log-softmax, and autograd.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = ("naive", "ours", "none")


def make_models(folder: Path, vocab: int) -> None:
    from transformers import AutoTokenizer

    from scripts.tiny_models import MODELS, initialise

    for name, spec in (
        ("student", MODELS["stories-student"]),
        ("teacher", MODELS["stories-teacher"]),
    ):
        initialise(folder / name, replace(spec, start=None, vocab_size=vocab))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.add_tokens([f"<|{i}|>" for i in range(vocab - len(tokenizer))])
        tokenizer.save_pretrained(folder / name)


def use_naive_losses() -> None:
    """Replace the two kernels that PowerOPD calls by what a framework without kernels does."""
    import torch

    import kernels
    from benchmarks.kernels import reference

    def naive_logprobs(
        hidden,
        weight,
        ids,
        *,
        temperature=1.0,
        mask=None,
        valid_vocab_size=None,
        bias=None,
        logit_softcap=None,
        **_,
    ):
        logits = reference.head_logits(
            hidden, weight, bias, softcap=logit_softcap, vocab=valid_vocab_size, dtype=hidden.dtype
        )
        # Frameworks divide by the temperature whatever it is, and so hold the logits twice.
        logprobs = torch.log_softmax(logits.float() / temperature, -1)
        constants = logprobs.detach()
        return kernels.LogprobOutput(
            reference.picked(logprobs, ids.clamp(min=0)),
            None,
            reference.entropy(constants),
            constants.amax(-1),
        )

    def naive_opd(
        hidden, weight, ids, teacher, *, denominator, mask, alpha, normalization, reward, **options
    ):
        options.pop("advantages"), options.pop("return_entropy")
        out = naive_logprobs(hidden, weight, ids, **options)
        logprobs = out.logprobs.detach()
        rewards = kernels.power_reward(
            teacher, logprobs, alpha, normalization=normalization, mask=mask
        )
        losses = reference.policy_loss(out.logprobs, rewards)
        loss = losses[mask.bool()].sum() / denominator
        return kernels.OPDOutput(loss, logprobs, rewards, out.entropy, {})

    kernels.fused_linear_logprobs, kernels.fused_linear_opd_loss = naive_logprobs, naive_opd


def child(way: str, overrides: list[str]) -> int:
    """One run, then its peak as the last line; returns the run's exit status."""
    if way == "naive":
        use_naive_losses()
    # Not as a script: that ends the process as soon as the run has.
    import train

    status = train.main(["recipe=poweropd", *overrides])
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            print("PEAK_KIB", line.split()[1])
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vocabulary",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.way:
        return child(args.way, overrides)
    peaks, losses = {}, {}
    with tempfile.TemporaryDirectory() as work:
        make_models(Path(work), args.vocab)
        for way in WAYS:
            steps = 0 if way == "none" else args.steps
            try:
                peaks[way] = run(way, Path(work), steps, overrides)
            except subprocess.CalledProcessError as failed:
                print(failed.stdout[-2000:] + failed.stderr[-2000:], file=sys.stderr)
                return 1
            if steps:
                losses[way] = step_losses(Path(work) / way)
            print(f"{way:6} peak {peaks[way]:.2f} GiB", flush=True)
    ours, naive = (peaks[way] - peaks["none"] for way in ("ours", "naive"))
    pairs = zip(losses["ours"], losses["naive"], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    print(
        f"V={args.vocab}: ours {peaks['ours']:.2f} GiB, naive {peaks['naive']:.2f} GiB, ratio "
        f"{peaks['ours'] / peaks['naive']:.2f}; above the run without a step: {ours:.2f} and "
        f"{naive:.2f} GiB; largest difference of a step's loss {difference:.1e}"
    )
    return 0


def run(way: str, work: Path, steps: int, overrides: list[str]) -> float:
    """One run in a process of its own; its peak in GiB.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.vocabulary",
        "--way",
        way,
        f"model.path={work}/student",
        f"teacher.path={work}/teacher",
        f"run.dir={work}/{way}",
        f"train.steps={steps}",
        "eval.every=-1",
        "log.wandb=disabled",
        "reward.alpha=0.1",
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.rsplit("PEAK_KIB", 1)[1]) / 2**20


def step_losses(folder: Path) -> list[float]:
    """`train/loss` of every step of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


if __name__ == "__main__":
    sys.exit(main())
