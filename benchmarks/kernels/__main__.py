"""python -m kernels.bench: this project's kernels beside naive torch, torch.compile and other
projects' kernels.

First comes what the device reaches (copy, GEMM), then row by row:
  1. every provider is compared with a float64 oracle;
  2. those within tolerance are timed in turn on the same inputs;
  3. their memory is measured in fresh processes.
One line per provider is printed as it goes, and a markdown table last.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.kernels.memory import MemoryProbe
from benchmarks.kernels.peers import DEFAULT, PEERS, load_peer
from benchmarks.kernels.problem import DTYPES
from benchmarks.kernels.report import Report, environment, gpu_state
from benchmarks.kernels.runner import Plan, Runner

SUITES = ("reward", "head", "kl")
# tokens, hidden, vocab, dtypes, seconds of timing per row
DEFAULTS = {
    "cuda": ([8192, 16384], [2048, 4096], [151936], ["bf16"], 2.0),
    "cpu": ([2048], [512], [32768, 151936], ["fp32", "bf16"], 5.0),
}
# Of the token-wise rows.
MOST_TOKENS = 65536
# Of the time; what does not fit in is measured at the end.
MEMORY_SHARE = 0.3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=("all", *SUITES), default="all")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tokens", type=_size, nargs="+", help="T; default 8192 16384, on the CPU 2048")
    add("--hidden", type=_size, nargs="+", help="H; default 2048 4096, on the CPU 512")
    add("--vocab", type=_size, nargs="+", help="V; default 151936, on the CPU also 32768")
    add("--dtype", choices=tuple(DTYPES), nargs="+", help="default bf16, on the CPU fp32 and bf16")
    add(
        "--mask",
        type=_fraction,
        default=0.2,
        help="fraction of masked tokens of the rows that run with and without",
    )
    add(
        "--peers",
        type=_peers,
        default=list(DEFAULT),
        metavar="A,B,…",
        help=f"of {', '.join(PEERS)}; default {','.join(DEFAULT)}. Of the others missing wheels "
        "are installed",
    )
    add(
        "--peers-dir",
        type=Path,
        default=Path(".bench-peers"),
        help="where to, outside the environment",
    )
    add("--rounds", type=_size, help="timed calls per provider; default: what fits, 3 to 50")
    add("--quick", action="store_true", help="3 rounds and small ceilings")
    add("--no-memory", action="store_true", help="leave out the processes that measure memory")
    add(
        "--budget-s",
        type=float,
        default=540.0,
        help="seconds for everything; rows that do not fit are skipped (the CPU's default shapes "
        "want more)",
    )
    add("--out", type=Path, help="JSON lines")
    return parser


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), got {text!r}")
    return value


def _peers(text: str) -> list[str]:
    names = list(dict.fromkeys(name for name in text.split(",") if name))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown peer {name!r}, known: {', '.join(PEERS)}")
    return names


def _plan(args: argparse.Namespace) -> Plan:
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, hidden, vocab, dtypes, row_seconds = DEFAULTS[device]
    return Plan(
        device=device,
        suites=SUITES if args.suite == "all" else (args.suite,),
        tokens=args.tokens or tokens,
        reward_tokens=args.tokens or [tokens[0], MOST_TOKENS],
        hidden=args.hidden or hidden,
        vocab=args.vocab or vocab,
        dtypes=args.dtype or dtypes,
        mask=args.mask,
        rounds=args.rounds or (3 if args.quick else None),
        row_seconds=row_seconds,
        small=args.quick,
    )


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    plan = _plan(args)
    try:
        report = Report(args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    peers = {
        name: load_peer(name, plan.device, args.peers_dir, install=True) for name in args.peers
    }
    about = environment(plan.device, args.peers)
    report.write("environment", arguments=sys.argv[1:] if argv is None else argv, **about)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value), flush=True)
    memory = None if args.no_memory else MemoryProbe(args.peers_dir, MEMORY_SHARE)
    try:
        Runner(plan, peers, report, started + args.budget_s, memory).run()
    finally:
        # What was measured is not lost to an interrupt.
        report.write("end", gpu=gpu_state() if plan.device == "cuda" else None)
        report.close()
        print("\n" + report.table(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
