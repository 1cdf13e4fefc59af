"""Makes the embedded models of recipes/models from seeds, by the project's own recipes, and checks
the files there.

`stories-student` is trained from random weights on the stories' worked solutions and stopped early.
`stories-teacher` goes on from it for much longer. As with a base student and a chat teacher, they
share a vocabulary but end on different tokens: the student on <|endoftext|>, the teacher on
<|im_end|>. `stories-verbose`, whose answers are there to be shortened, learns solutions with
redundant steps. `stories-streaming` thinks while it reads, in many ways: the recipe `streaming_sft`
makes it from the student, which calculates right about half of the time. `translation-untrained`
has random weights, and words of the invented languages of `data.path=translation`.

    python -m scripts.tiny_models                        check the files against the manifest, and list the models
    python -m scripts.tiny_models --remake [NAME …]      make them again, and their entries of the manifest
        --out DIR           there instead of in recipes/models
        --steps N           shortened, to see that the command works
        --vocab-size V      with embeddings padded to V rows, e.g. 151936

A model depends on the rounding of the machine, and so on its number of threads: made elsewhere, it
differs. That is why the files come with the project."""

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
from recipes.errors import ModelError, OnstreamError
from recipes.registry import nearest
from scripts.cli import print_error, quiet_libraries
from scripts.new_model import learn_tokenizer, qwen3, save

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class TinyModel:
    """How one tiny model is made."""

    end: str  # its end token
    steps: int  # of supervised fine-tuning
    seed: int
    start: str | None = None  # the model it goes on from; None: random weights
    hidden: int = 128
    layers: int = 3
    lr: float = 5e-3
    schedule: str = "cosine"  # of the learning rate, after 20 steps of warm-up
    prompts: int = 48  # per step
    recipe: str = "sft"
    verbose: bool = False  # learns solutions with redundant steps
    difficulty: int = 3  # of the stories it learns
    vocab_size: int = 0  # of the embedding; 0: the tokenizer's
    # arguments of scripts.evaluate; (): it has no accuracy
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
    "translation-untrained": TinyModel(
        end="<|endoftext|>", steps=0, seed=5, recipe="proactivellm", evaluation=()
    ),
}


def make(name: str, spec: TinyModel, out: Path, prompts: int = 400) -> Path:
    """Make a model as OUT/NAME, from its start there or among the embedded models, and note it in
    OUT/manifest.json.

    Its weights are trained in float32 and written in bfloat16; it is evaluated on so many held-out
    prompts.

    Raises:
        ModelError: training or evaluating it failed.
    """
    start = None
    if spec.start is not None:
        start = out / spec.start if (out / spec.start).is_dir() else embedded.FOLDER / spec.start
    how = f"{spec.steps} steps of recipe={spec.recipe}" if spec.steps else "random weights"
    print(f"making {name} ({how}) in {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="onstream-") as folder:
        work = Path(folder)
        made = work / "start"
        initialise(made, spec, start)
        if spec.steps:
            train(work, spec)
            made = work / "run" / "checkpoints" / f"step_{spec.steps}" / "model"
        store(made, out / name)
    note(name, spec, out, prompts)
    return out / name


def train(work: Path, spec: TinyModel) -> None:
    """Run the spec's recipe on WORK/start into WORK/run, in a process of one rank."""
    stories = max(spec.steps * spec.prompts, 1)
    arguments = {
        "recipe": spec.recipe,
        "model.path": work / "start",
        "run.dir": work / "run",
        "seed": spec.seed,
        "train.steps": spec.steps,
        "train.lr": spec.lr,
        "train.schedule": spec.schedule,
        "train.prompts_per_step": spec.prompts,
        "data.stories": stories,
        "data.difficulty": spec.difficulty,
        "data.verbose": spec.verbose,
        "engine": "zero0",
        "log.wandb": "disabled",
        "log.every": 100,
        "log.completions": 0,
        "eval.every": -1,
    }
    command(
        ["train.py", *(f"{key}={value}" for key, value in arguments.items())],
        "could not be trained",
    )


def command(arguments: list[str], failure: str) -> str:
    """Run a command of the project; what it prints is passed on, and the last line returned."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    line = ""
    for line in process.stdout:
        print(f"  {line}", end="", flush=True)
    if process.wait():
        raise ModelError(
            f"the model {failure} (exit status {process.returncode}); what it printed says why"
        )
    return line


def store(source: Path, folder: Path) -> None:
    """Write the model of a folder as `folder`, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def note(name: str, spec: TinyModel, out: Path, prompts: int) -> None:
    """Evaluate OUT/NAME, and write its entry of OUT/manifest.json."""
    import torch
    import transformers

    entry = {
        "command": f"python -m scripts.tiny_models --remake {name}",
        "made": f"{datetime.date.today()}",
        "commit": commit(),
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "spec": asdict(spec),
    }
    if spec.evaluation:
        engine = "streaming" if spec.recipe == "streaming_sft" else "hf"
        arguments = [
            f"model={out / name}",
            "k=8",
            f"engine={engine}",
            f"size={prompts}",
            *spec.evaluation,
        ]
        scores = json.loads(
            command(["-m", "scripts.evaluate", *arguments], "could not be evaluated")
        )
        entry["evaluation"] = {
            "command": " ".join(["python -m scripts.evaluate", f"model={name}", *arguments[1:]]),
            "prompts": scores["prompts"],
            "avg@8": round(scores["avg@8"], 4),
            "length_mean": round(scores["length_mean"], 2),
        }
    entry["files"] = {
        file.name: [file.stat().st_size, checksum(file)] for file in sorted((out / name).iterdir())
    }
    path = out / embedded.MANIFEST
    entries = embedded.manifest(out) if path.exists() else {}
    path.write_text(json.dumps(entries | {name: entry}, indent=1, sort_keys=True) + "\n")


def commit() -> str:
    """The commit of the checkout, with a plus where files differ from it; "unknown" without git."""
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
    """The manifest of a folder of models, every file of which is as it says.

    Raises:
        ModelError: a file is missing, changed, or not in the manifest; the message names it.
    """
    path, entries = folder / embedded.MANIFEST, embedded.manifest(folder)
    there = {file.relative_to(folder) for file in folder.glob("*/*")}
    for name, entry in entries.items():
        for file, (size, digest) in entry["files"].items():
            place = folder / name / file
            if not place.is_file():
                raise ModelError(f"{place} is missing; take it from the repository again")
            if place.stat().st_size != size or checksum(place) != digest:
                raise ModelError(
                    f"{place} is not the file that {path} lists; take it from the repository again"
                )
            there.discard(place.relative_to(folder))
    if there:
        raise ModelError(f"{folder / sorted(there)[0]} is not in {path}; delete it")
    return entries


def initialise(folder: Path, spec: TinyModel, start: Path | None = None) -> None:
    """Write the untrained model and its tokenizer: random weights, or those of `start`, with
    `spec.end`."""
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
        heads=spec.hidden // 32,
        vocab=spec.vocab_size,
    )
    if start is None:
        model = Qwen3ForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(start, config=config, dtype=torch.float32)
    save(folder, model, tokenizer)


def make_tokenizer(end: str, verbose: bool = False):
    """A byte-level BPE of up to 512 tokens learned from stories, each digit a token of its own; any
    text encodes."""
    from rollouts.data.stories import story

    texts = []
    for index in range(2000):
        sample = story(0, index, "train", difficulty=4, verbose=verbose)
        texts += [f"user\n{sample.prompt}\nassistant\n", sample.solution]
    tokenizer = learn_tokenizer(texts, 512, SPECIAL, end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def translation_tokenizer():
    """One of the invented languages of `data.path=translation`, in which every word is a token."""
    from rollouts.data.translation import translation

    made = [translation(0, index, "train") for index in range(2000)]
    return learn_tokenizer([text for one in made for text in (one.source, one.target)], 700)


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.tiny_models", description="check, list or make the embedded models"
    )
    parser.add_argument(
        "--remake", nargs="*", metavar="NAME", help="make these; without a name, all"
    )
    parser.add_argument("--out", type=Path, default=embedded.FOLDER, help="the folder they go to")
    parser.add_argument("--steps", type=int, help="of training, instead of what each takes")
    parser.add_argument(
        "--vocab-size", type=int, default=0, help="pad the embedding to so many rows"
    )
    options = parser.parse_args(arguments)
    try:
        if options.remake is None:
            for name, entry in check(options.out).items():
                size = sum(size for size, _ in entry["files"].values())
                accuracy = "untrained"
                if "evaluation" in entry:
                    accuracy = f"avg@8 {entry['evaluation']['avg@8']:.3f}"
                print(
                    f"{name:24} {size / 2**20:.2f} MiB  {accuracy:12} made {entry['made']} at "
                    f"{entry['commit']}"
                )
            return 0
        for name in options.remake:
            if name not in MODELS:
                raise ModelError(f"there is no model '{name}'{nearest(name, MODELS)}")
        for name in options.remake or MODELS:
            spec, prompts = replace(MODELS[name], vocab_size=options.vocab_size), 400
            if options.steps is not None:
                spec, prompts = replace(spec, steps=min(spec.steps, options.steps)), 40
            print(make(name, spec, options.out, prompts))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
