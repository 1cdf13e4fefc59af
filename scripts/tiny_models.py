"""Makes the embedded models of recipes/models from seeds, by the project's own recipes.

    python -m scripts.tiny_models                     check the files, and list the models
    python -m scripts.tiny_models --remake            make all models again
    python -m scripts.tiny_models --remake NAME …     make these again, with their manifest entries
        --out DIR          there, instead of in recipes/models
        --steps N          with at most N training steps, to see that the command works
        --vocab-size V     with embeddings padded to V rows, e.g. 151936

The models are:

    stories-student         trained from random weights on the stories' worked solutions, and
                            stopped early
    stories-teacher         goes on from the student for much longer
    stories-verbose         learns solutions with redundant steps; its answers are there to be
                            shortened
    stories-streaming       thinks while it reads, in many ways; recipe=streaming_sft makes it from
                            the student, which calculates right about half of the time
    stories-reader          half as wide; reads the solution in seven prompts of ten, so that it
                            can teach itself
    translation-untrained   random weights, and the words of the invented languages of
                            data.path=translation

The student and the teacher share a vocabulary but end on different tokens, as a base student and a
chat teacher do: the student on <|endoftext|>, the teacher on <|im_end|>.

A model depends on the rounding of the machine, and so on its number of threads. A model made
elsewhere differs. That is why the files come with the project.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recipes import embedded
from recipes.errors import ModelError
from recipes.registry import nearest
from scripts.cli import launch, run_command
from scripts.new_model import learn_tokenizer, qwen3, save

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What a teacher reads that knows the solution, as in recipe=opsd.
READ = "{prompt}\n\n{solution}"
HEAD_SIZE = 32
TEXTS = 2000  # generated ones, which a tokenizer is learned from
EVALUATION_PROMPTS = 400
SHORTENED_PROMPTS = 8  # the evaluation prompts of a shortened remake


@dataclass(frozen=True)
class TinyModel:
    """How one tiny model is made."""

    # Its end token.
    end: str
    # Steps of supervised fine-tuning.
    steps: int
    seed: int
    # The model that it goes on from; None for random weights.
    start: str | None = None
    hidden: int = 128
    layers: int = 3
    lr: float = 5e-3
    # Of the learning rate, after 20 steps of warm-up.
    schedule: str = "cosine"
    # Prompts per step.
    prompts: int = 48
    recipe: str = "sft"
    # Whether it learns solutions with redundant steps.
    verbose: bool = False
    # The share of its prompts that hold their solution (`READ`).
    reads: float = 0.0
    # Of the stories that it learns.
    difficulty: int = 3
    # Rows of the embedding; 0 for as many as the tokenizer has tokens.
    vocab_size: int = 0
    # Arguments of scripts.evaluate; none for a model without an accuracy.
    evaluation: tuple[str, ...] = ("data=stories",)


MODELS = {
    "stories-student": TinyModel(end="<|endoftext|>", steps=550, seed=1, schedule="constant"),
    "stories-teacher": TinyModel(
        end="<|im_end|>", steps=2500, seed=2, start="stories-student", schedule="linear"
    ),
    "stories-verbose": TinyModel(
        end="<|endoftext|>",
        steps=1200,
        seed=3,
        verbose=True,
        difficulty=2,
        evaluation=("data=stories", "data.difficulty=2", "max_new_tokens=160"),
    ),
    "stories-streaming": TinyModel(
        end="<|im_end|>",
        steps=500,
        seed=4,
        start="stories-student",
        lr=4e-3,
        recipe="streaming_sft",
        difficulty=2,
        evaluation=(
            "mode=streaming",
            "data=stories",
            "data.difficulty=2",
            "data.distractors=2",
            "max_new_tokens=60",
        ),
    ),
    "stories-reader": TinyModel(end="<|endoftext|>", steps=1500, seed=6, hidden=64, reads=0.7),
    "translation-untrained": TinyModel(
        end="<|endoftext|>", steps=0, seed=5, recipe="proactivellm", evaluation=()
    ),
}


def make(name: str, spec: TinyModel, out: Path, prompts: int = EVALUATION_PROMPTS) -> Path:
    """Make a model as OUT/NAME, and note it in OUT/manifest.json.

    Its weights are trained in float32 and written in bfloat16. The model that it goes on from is
    the one in OUT, else the embedded one.

    Args:
        prompts: the number of held-out prompts that it is evaluated on.

    Raises:
        ModelError: training or evaluating it failed.
    """
    start = None
    if spec.start is not None:
        remade = out / spec.start
        start = remade if remade.is_dir() else embedded.FOLDER / spec.start
    how = f"{spec.steps} steps of recipe={spec.recipe}" if spec.steps else "random weights"
    print(f"making {name} ({how}) in {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="onstream-") as temporary:
        work = Path(temporary)
        model = work / "start"
        initialise(model, spec, start)
        if spec.steps:
            train(work, spec)
            model = work / "run" / "checkpoints" / f"step_{spec.steps}" / "model"
        store(model, out / name)
    note(name, spec, out, prompts)
    return out / name


def train(work: Path, spec: TinyModel) -> None:
    """Run the spec's recipe on WORK/start into WORK/run, in a process of one rank."""
    arguments = {
        "recipe": spec.recipe,
        "model.path": work / "start",
        "run.dir": work / "run",
        "seed": spec.seed,
        "train.steps": spec.steps,
        "train.lr": spec.lr,
        "train.schedule": spec.schedule,
        "train.prompts_per_step": spec.prompts,
        # Each story is seen once.
        "data.stories": spec.steps * spec.prompts,
        "data.difficulty": spec.difficulty,
        "data.verbose": spec.verbose,
        "engine": "zero0",
        "log.wandb": "disabled",
        "log.every": 100,
        "log.completions": 0,
        "eval.every": -1,
    }
    if spec.reads:
        arguments["data.path"] = work / "read.jsonl"
        write_read_stories(arguments["data.path"], spec)
    command(
        ["train.py", *(f"{key}={value}" for key, value in arguments.items())],
        "could not be trained",
    )


def write_read_stories(file: Path, spec: TinyModel) -> None:
    """Write the stories of a run as JSONL; most of their prompts hold the solution."""
    from rollouts.data.stories import hash_percent, story

    with file.open("w") as out:
        for index in range(spec.steps * spec.prompts):
            read = story(spec.seed, index, "train", difficulty=spec.difficulty)
            row = {"solution": read.solution, "answer": read.answer}
            reads = hash_percent(f"{spec.seed} {index}") < 100 * spec.reads
            row["prompt"] = READ.format(prompt=read.prompt, **row) if reads else read.prompt
            out.write(json.dumps(row))
            out.write("\n")


def command(arguments: list[str], failure: str) -> str:
    """Run a command of the project, and pass on what it prints; returns its last line.

    Args:
        failure: what to say of the model where the command fails.

    Raises:
        ModelError: the command failed.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(cpu_cores()))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = ""
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
    status = process.wait()
    if status:
        raise ModelError(f"the model {failure} (exit status {status}); what it printed says why")
    return line


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def store(source: Path, folder: Path) -> None:
    """Write the model of a folder as another folder, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The folder appears under its name only when it is whole.
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def note(name: str, spec: TinyModel, out: Path, prompts: int) -> None:
    """Evaluate OUT/NAME, and write its entry of OUT/manifest.json."""
    entry = {
        "command": f"python -m scripts.tiny_models --remake {name}",
        "made": f"{datetime.date.today()}",
        "commit": commit(),
        "machine": machine(),
        "spec": asdict(spec),
    }
    if spec.evaluation:
        entry["evaluation"] = measure(name, spec, out, prompts)
    entry["files"] = {
        file.name: [file.stat().st_size, checksum(file)] for file in sorted((out / name).iterdir())
    }
    manifest = out / embedded.MANIFEST
    entries = embedded.manifest(out) if manifest.exists() else {}
    entries[name] = entry
    manifest.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def measure(name: str, spec: TinyModel, out: Path, prompts: int) -> dict:
    """Evaluate OUT/NAME; returns the scores, and the command that measures them.

    Raises:
        ModelError: evaluating it failed.
    """
    engine = "streaming" if spec.recipe == "streaming_sft" else "hf"
    arguments = ["k=8", f"engine={engine}", f"size={prompts}", *spec.evaluation]
    last_line = command(
        ["-m", "scripts.evaluate", f"model={out / name}", *arguments], "could not be evaluated"
    )
    scores = json.loads(last_line)
    return {
        "command": " ".join(["python -m scripts.evaluate", f"model={name}", *arguments]),
        "prompts": scores["prompts"],
        "avg@8": round(scores["avg@8"], 4),
        "length_mean": round(scores["length_mean"], 2),
    }


def machine() -> str:
    """What a model's rounding depends on: cores, threads and libraries."""
    import torch
    import transformers

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{cpu_cores()} CPU cores, {threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def commit() -> str:
    """The commit of the checkout, or "unknown" without git; a plus: files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def checksum(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def check(folder: Path) -> dict:
    """Compare a folder of models with its manifest; returns the manifest.

    Raises:
        ModelError: a file is missing, changed, or not in the manifest; the message names it.
    """
    manifest = folder / embedded.MANIFEST
    entries = embedded.manifest(folder)
    unlisted = set(folder.glob("*/*"))
    for name, entry in entries.items():
        for file_name, (size, digest) in entry["files"].items():
            file = folder / name / file_name
            if not file.is_file():
                raise ModelError(f"{file} is missing; take it from the repository again")
            if file.stat().st_size != size or checksum(file) != digest:
                raise ModelError(
                    f"{file} is not the file that {manifest} lists; "
                    "take it from the repository again"
                )
            unlisted.discard(file)
    if unlisted:
        raise ModelError(f"{min(unlisted)} is not in {manifest}; delete it")
    return entries


def initialise(folder: Path, spec: TinyModel, start: Path | None = None) -> None:
    """Write a model that is to be trained, and its tokenizer.

    Args:
        start: the model folder whose weights it has; None for random weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    if spec.recipe == "proactivellm":
        tokenizer = translation_tokenizer()
    else:
        tokenizer = make_tokenizer(spec.end, spec.verbose)
    torch.manual_seed(spec.seed)
    config = qwen3(
        tokenizer,
        hidden=spec.hidden,
        layers=spec.layers,
        heads=spec.hidden // HEAD_SIZE,
        vocab=spec.vocab_size,
    )
    if start is None:
        model = Qwen3ForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(start, config=config, dtype=torch.float32)
    save(folder, model, tokenizer)


def make_tokenizer(end: str, verbose: bool = False):
    """A byte-level BPE of up to 512 tokens, learned from stories; each digit is a token."""
    from rollouts.data.stories import story

    texts = []
    for index in range(TEXTS):
        sample = story(0, index, "train", difficulty=4, verbose=verbose)
        texts += [f"user\n{sample.prompt}\nassistant\n", sample.solution]
    tokenizer = learn_tokenizer(texts, 512, SPECIAL, end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def translation_tokenizer():
    """A tokenizer in which every word of `data.path=translation` is a token."""
    from rollouts.data.translation import translation

    texts = []
    for index in range(TEXTS):
        sample = translation(0, index, "train")
        texts += [sample.source, sample.target]
    return learn_tokenizer(texts, 700)


def main(arguments: list[str]) -> int:
    """Check, list or make the embedded models; returns the exit status."""
    return run_command(check_or_remake, arguments, __doc__, keys={})


def check_or_remake(arguments: list[str]) -> None:
    options = parse(arguments)
    if options.remake is None:
        list_models(options.out)
    else:
        remake(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    # The module's docstring is the help, so the parser has none of its own.
    parser = argparse.ArgumentParser(prog="python -m scripts.tiny_models", add_help=False)
    parser.add_argument("--remake", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=embedded.FOLDER)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--vocab-size", type=int, default=0)
    return parser.parse_args(arguments)


def list_models(folder: Path) -> None:
    """Print a line per model of a folder, whose files are checked.

    Raises:
        ModelError: a file is not as the manifest says.
    """
    for name, entry in check(folder).items():
        size = sum(size for size, _ in entry["files"].values())
        accuracy = "untrained"
        if "evaluation" in entry:
            accuracy = f"avg@8 {entry['evaluation']['avg@8']:.3f}"
        print(
            f"{name:24} {size / 2**20:.2f} MiB  {accuracy:12} "
            f"made {entry['made']} at {entry['commit']}"
        )


def remake(options: argparse.Namespace) -> None:
    """Make the models that the options name, or all.

    Raises:
        ModelError: a name is unknown, or training or evaluating a model failed.
    """
    for name in options.remake:
        if name not in MODELS:
            raise ModelError(f"there is no model '{name}'{nearest(name, MODELS)}")
    for name in options.remake or MODELS:
        spec = replace(MODELS[name], vocab_size=options.vocab_size)
        prompts = EVALUATION_PROMPTS
        if options.steps is not None:
            spec = replace(spec, steps=min(spec.steps, options.steps))
            prompts = SHORTENED_PROMPTS
        print(make(name, spec, options.out, prompts))


if __name__ == "__main__":
    launch(main)
