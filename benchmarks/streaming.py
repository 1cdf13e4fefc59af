"""Streaming generation in a batch against one sequence at a time, on a model with random weights.

    python -m benchmarks.streaming [--batch 16] [--sentences 4] [--repeats 2] [KEY=VALUE …]

Rows have ragged segments and closing tokens at random, as rollouts have; "one at a time" is the
same engine with `rollout.batch_size=1`, and "live" the reader that sees a segment only when it
comes. All three write the same tokens."""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path


def main() -> int:
    import numpy as np
    import torch

    from recipes.compose import compose
    from rollouts.streaming.engine import StreamingEngine
    from rollouts.streaming.tokens import StreamingSampling
    from rollouts.trajectory import Request
    from scripts.cli import quiet_libraries, quiet_torch
    from scripts.tiny_models import MODELS, initialise

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    args, overrides = parser.parse_known_args()
    quiet_libraries()
    quiet_torch()
    rng = np.random.default_rng(0)
    requests = []
    for index in range(args.batch):
        sizes = rng.integers(8, 20, args.sentences + 2)
        segments = tuple(tuple(rng.integers(20, 500, size).tolist()) for size in sizes)
        requests.append(
            Request(
                index,
                0,
                tuple(i for part in segments for i in part),
                index,
                segments,
                ((20,), (21,)),
            )
        )
    # About one token in ten closes a thought, so that rows go their own ways.
    sampling = StreamingSampling(
        max_new_tokens=24,
        stop_ids=tuple(range(3, 8)),
        thought_stops=tuple(range(8, 60)),
        max_thought_tokens=16,
        close_id=8,
    )
    with tempfile.TemporaryDirectory() as work:
        initialise(Path(work), replace(MODELS["stories-student"], start=None, vocab_size=512))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = compose(["recipe=streaming_sft", "streaming.layout=grouped", *overrides])
        engine = StreamingEngine(work, config, device, torch.float32)

    def batched(size: int):
        def run() -> list[list[int]]:
            engine.batch_size = size
            return [t.completion_ids[2:] for t in engine.generate(requests, sampling)]

        return run

    def live() -> list[list[int]]:
        written = []
        for request in requests:
            reader, own = engine.live(sampling, request.seed), []
            for step, segment in enumerate(request.segments):
                reader.feed(segment)
                own += reader.write() if step > 1 else reader.force(request.opening[step]) or ()
            written.append([token for token, _, _ in (*own, *reader.write(deep=True))])
        return written

    ways = {
        "one at a time": batched(1),
        "live": live,
        f"batch of {args.batch}": batched(args.batch),
    }
    speeds: dict[str, float] = {}
    texts = []
    print(
        f"{'':16} {'tokens':>8} {'seconds':>8} {'tokens/s':>9} {'ratio':>6}   {device.type}, "
        f"best of {args.repeats}"
    )
    batched(args.batch)()
    for name, way in ways.items():
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            texts.append(way())
            times.append(time.perf_counter() - start)
        count = sum(map(len, texts[-1]))
        speeds[name] = count / min(times)
        ratio = speeds[name] / speeds["one at a time"]
        print(
            f"{name:16} {count:8d} {min(times):8.2f} {speeds[name]:9.0f} {ratio:6.2f}", flush=True
        )
    same = sum(text == texts[0] for text in texts)
    print(f"{same} of {len(texts)} runs wrote the same tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
