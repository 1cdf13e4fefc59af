"""Makes the embedded tiny models: on first use, from a seed, by the project's own `sft` recipe.

`model.path=stories-student` and `teacher.path=stories-teacher` (the defaults) name them: Qwen3 decoders of 0.65M
parameters. The student is trained from random weights on the stories' worked solutions and stopped early; the
teacher goes on from there. As with a base student and a chat teacher, they share a vocabulary but end on different
tokens: the student on <|endoftext|>, the teacher on <|im_end|>. `stories-verbose`, whose answers are there to be
shortened, learns solutions with redundant steps. `stories-streaming` thinks while it reads, in many ways: the recipe
`streaming_sft` makes it from the teacher, which can calculate. `translation-untrained` has random weights, and words of
the invented languages of `data.path=translation`.

    python -m scripts.tiny_models [--vocab-size V]      make all of them now, and print their folders
"""
from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from recipes.errors import ModelError
from scripts.new_model import learn_tokenizer, qwen3, save

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
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
    prompts: int = 48  # per step
    recipe: str = "sft"
    verbose: bool = False  # learns solutions with redundant steps
    difficulty: int = 3  # of the stories it learns
    vocab_size: int = 0  # of the embedding; 0: the tokenizer's


MODELS = {
    "stories-student": TinyModel(end="<|endoftext|>", steps=500, seed=1),
    "stories-teacher": TinyModel(end="<|im_end|>", steps=500, seed=2, start="stories-student"),
    "stories-verbose": TinyModel(end="<|endoftext|>", steps=800, seed=3, verbose=True, difficulty=2),
    "stories-streaming": TinyModel(end="<|im_end|>", steps=500, seed=4, start="stories-teacher", lr=4e-3,
                                   recipe="streaming_sft", difficulty=2),
    "translation-untrained": TinyModel(end="<|endoftext|>", steps=0, seed=5, recipe="proactivellm"),
}


def cache_dir() -> Path:
    """Where made models are kept: $ONSTREAM_CACHE, else ~/.cache/onstream."""
    return Path(os.environ.get("ONSTREAM_CACHE") or Path.home() / ".cache" / "onstream")


def make_embedded_models(config: DictConfig) -> None:
    """Replace the names of embedded models in a config by their folders, making what is not there yet."""
    from trainers.prepare import TRAINERS  # where all are registered

    sections = [config.model, config.teacher] if TRAINERS.resolve(config.trainer).distills else [config.model]
    for section in sections:
        if section.path in MODELS:
            section.path = str(make(section.path))


def make(name: str, vocab_size: int = 0) -> Path:
    """The folder of a tiny model, trained first if it is not in the cache. Ranks wait for the one that trains.

    The cache key holds what the weights follow from: how it and its start are made, and the code of stories and models.

    Raises:
        ModelError: training failed.
    """
    from filelock import FileLock

    spec, chain = replace(MODELS[name], vocab_size=vocab_size), name
    data = "translation" if spec.recipe == "proactivellm" else "stories"
    code = (f"rollouts/{data}.py", "scripts/new_model.py")
    made_by = [str(vocab_size), *((ROOT / file).read_text() for file in code)]
    while chain:
        made_by.append(repr(MODELS[chain]))
        chain = MODELS[chain].start
    folder = cache_dir() / f"{name}-{hashlib.blake2b(''.join(made_by).encode(), digest_size=6).hexdigest()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            start = make(spec.start, vocab_size) if spec.start else None
            how = f"{spec.steps} steps of recipe={spec.recipe}" if spec.steps else "random weights"
            print(f"making {name} ({how}) in {folder}; once only", flush=True)
            work = Path(f"{folder}.work")
            shutil.rmtree(work, ignore_errors=True)
            initialise(work / "start", spec, start)
            if spec.steps:
                train(work, spec)
            made = work / "run" / "checkpoints" / f"step_{spec.steps}" / "model" if spec.steps else work / "start"
            made.rename(folder)
            shutil.rmtree(work)
    return folder


def train(work: Path, spec: TinyModel) -> None:
    """Run the spec's recipe on WORK/start into WORK/run, in a process of one rank."""
    arguments = [f"recipe={spec.recipe}", f"model.path={work / 'start'}", f"run.dir={work / 'run'}",
                 f"seed={spec.seed}", f"train.steps={spec.steps}", f"train.lr={spec.lr}",
                 f"train.prompts_per_step={spec.prompts}",
                 f"data.stories={spec.steps * spec.prompts}", f"data.difficulty={spec.difficulty}",
                 f"data.verbose={spec.verbose}", "engine=zero0", "log.wandb=disabled", "log.every=100",
                 "log.completions=0", "eval.every=-1"]
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("TORCHELASTIC", "MASTER_", "GROUP_", "ROLE_"))
                   and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))  # not torchrun's 1
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], env=environment, cwd=ROOT)
    if done.returncode:
        raise ModelError(f"the embedded model in {work} could not be trained (exit status {done.returncode}); what "
                         "it printed says why")


def initialise(folder: Path, spec: TinyModel, start: Path | None = None) -> None:
    """Write the untrained model and its tokenizer: random weights, or those of `start`, with `spec.end`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    tokenizer = make_tokenizer(spec.end, spec.verbose) if spec.recipe != "proactivellm" else translation_tokenizer()
    torch.manual_seed(spec.seed)
    config = qwen3(tokenizer, hidden=spec.hidden, layers=spec.layers, heads=spec.hidden // 32, vocab=spec.vocab_size)
    save(folder, Qwen3ForCausalLM(config) if start is None
         else AutoModelForCausalLM.from_pretrained(start, config=config), tokenizer)


def make_tokenizer(end: str, verbose: bool = False):
    """A byte-level BPE of up to 512 tokens learned from stories, each digit a token of its own; any text encodes."""
    from rollouts.stories import story

    texts = []
    for index in range(2000):
        sample = story(0, index, "train", difficulty=4, verbose=verbose)
        texts += [f"user\n{sample.prompt}\nassistant\n", sample.solution]
    tokenizer = learn_tokenizer(texts, 512, SPECIAL, end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def translation_tokenizer():
    """One of the invented languages of `data.path=translation`, in which every word is a token."""
    from rollouts.translation import translation

    made = [translation(0, index, "train") for index in range(2000)]
    return learn_tokenizer([text for one in made for text in (one.source, one.target)], 700)


def main() -> int:
    parser = argparse.ArgumentParser(description="make the embedded tiny models")
    parser.add_argument("--vocab-size", type=int, default=0, help="pad the embedding to this many rows, e.g. 151936")
    size = parser.parse_args().vocab_size
    for name in MODELS:
        print(make(name, size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
