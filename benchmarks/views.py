"""ProactiveLLM's one forward for all views of a target against a forward per view: time and memory
of a step.

    python -m benchmarks.views [--join 1] [--sentences 48] [--hidden 128] [--layers 3]
        [--repeats 5] [KEY=VALUE …]

The same model, tokens, schedules and losses on either side; their losses are compared. A view per
forward encodes the source once per view. `--join` makes longer sources of that many generated
sentences. Memory is the peak of forward and backward above what is there before, gradients included
(Linux, or a GPU)."""

import argparse
import functools
import gc
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path


def main() -> int:
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    import kernels
    from benchmarks.kernels.memory import MIB, peak_bytes, start_watch
    from recipes.compose import compose
    from rollouts.data.examples import Example
    from rollouts.data.load import load_examples
    from rollouts.layout import Layout
    from rollouts.simultaneous.prompts import unit_prompts
    from scripts.cli import quiet_libraries, quiet_torch
    from scripts.tiny_models import TinyModel, initialise
    from trainers.core.batching import pack
    from trainers.core.policy import load_policy
    from trainers.losses import Loss
    from trainers.modes import reading_mode
    from trainers.proactivellm import ProactiveLLM
    from trainers.run import Run

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.views",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (
        ("join", 1),
        ("sentences", 48),
        ("hidden", 128),
        ("layers", 3),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, overrides = parser.parse_known_args()
    quiet_libraries()
    quiet_torch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = compose(["recipe=proactivellm", "data.max_prompt_tokens=4096", *overrides])
    with tempfile.TemporaryDirectory() as work:
        initialise(
            Path(work),
            TinyModel(
                end="<|endoftext|>",
                steps=0,
                seed=0,
                hidden=args.hidden,
                layers=args.layers,
                recipe="proactivellm",
            ),
        )
        tokenizer = AutoTokenizer.from_pretrained(work)
        policy = load_policy(work, torch.float32, device, masked=True)
    made = load_examples("translation", size=args.sentences * args.join)
    examples = []
    for index in range(args.sentences):
        parts = made[index * args.join : (index + 1) * args.join]
        source, target = (
            " ".join(texts)
            for texts in zip(*((p.messages[-1]["content"], p.solution) for p in parts))
        )
        examples.append(Example(index, [{"role": "user", "content": source}], target, target))
    prompts, _ = unit_prompts(examples, tokenizer, config, "translation")
    method = ProactiveLLM(
        Run(
            config=config,
            mode=reading_mode(config),
            device=device,
            tokenizer=tokenizer,
            stop_ids=(tokenizer.eos_token_id,),
            vocab=len(tokenizer),
            prompts=prompts,
            sampler=None,
        )
    )
    drawn = [method.read(prompt, 0) for prompt in prompts]
    method.annotate(drawn)
    total = float(sum(t.sampled_mask.sum() for t in drawn))
    everything = range(len(drawn))

    def together() -> torch.Tensor:
        return policy(
            pack(drawn, everything, device), functools.partial(method.loss(), denominator=total)
        )["loss"]

    def view(trajectory, number: int):
        chosen = trajectory.layout.views == number
        by_token = {name: getattr(trajectory, name) for name in ("sampled", "reads")}
        return replace(
            trajectory,
            **{
                name: None if values is None else values[chosen]
                for name, values in by_token.items()
            },
            completion_ids=np.array(trajectory.completion_ids)[chosen].tolist(),
            layout=Layout(trajectory.layout.source, trajectory.layout.visible[chosen]),
            annotations={name: values[chosen] for name, values in trajectory.annotations.items()},
        )

    def apart() -> torch.Tensor:
        plain, kind, teacher, loss = (
            Loss(cross_entropy=True),
            method.loss().self_distillation,
            None,
            0,
        )
        for number in range(int(drawn[0].layout.views.max()) + 1):
            batch = pack([view(t, number) for t in drawn], everything, device)
            hidden = policy.hidden(batch)
            loss = loss + plain(policy.head, hidden, batch, denominator=total)["loss"]
            if teacher is None:
                teacher = hidden.detach()
            elif kind:
                loss = (
                    loss
                    + kernels.fused_linear_self_distillation_kl(
                        hidden,
                        teacher,
                        policy.head.weight,
                        denominator=total,
                        mask=batch.mask,
                        weights=batch.annotations["kl_weights"],
                        **kind,
                    ).loss
                )
        return loss

    def step(way) -> tuple[float, float]:
        gc.collect()
        policy.zero_grad(set_to_none=True)
        before = start_watch(
            device.type, torch.cuda.memory_allocated() if device.type == "cuda" else 0
        )
        started = time.perf_counter()
        loss = way()
        loss.backward()
        peak = peak_bytes(device.type) - before
        losses[way] = float(loss.detach())
        return time.perf_counter() - started, peak / MIB

    losses: dict = {}
    ways = {"one forward": together, "one per view": apart}
    for way in ways.values():
        step(way)
    found = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            found[name].append(step(way))
    source = np.mean([t.layout.source for t in drawn])
    print(
        f"{device.type}, {len(drawn)} sentences, {source:.0f} source tokens, "
        f"{total / len(drawn):.0f} target tokens "
        f"in {int(drawn[0].layout.views.max()) + 1} views; medians of {args.repeats}"
    )
    medians = {name: np.median(rows, axis=0) for name, rows in found.items()}
    for name, (seconds, mib) in medians.items():
        ratios = (
            medians["one forward"] / medians["one per view"] if name == "one forward" else (1, 1)
        )
        print(
            f"{name:14} {seconds:7.3f} s  x{ratios[0]:.2f}   {mib:7.0f} MiB  x{ratios[1]:.2f}   "
            f"loss {losses[ways[name]]:.6f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
