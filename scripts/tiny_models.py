"""Makes the embedded tiny teacher and student: on first use, from a seed, by the project's own `sft` recipe.

`model.path=stories-student` and `teacher.path=stories-teacher` (the defaults) name them. They are Qwen3 decoders
of well under a million parameters, trained from random weights on the stories' worked solutions; the student is
smaller and stopped earlier. As with a base student and a chat teacher, they share a vocabulary but end on
different tokens: the student on <|endoftext|>, the teacher on <|im_end|>.

    python -m scripts.tiny_models [--vocab-size V]      make both now, and print their folders
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig

from recipes.errors import ModelError

ROOT = Path(__file__).resolve().parent.parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class TinyModel:
    """A recipe for one tiny model."""

    hidden: int
    layers: int
    steps: int
    end: str  # its end token
    seed: int
    lr: float = 4e-3
    prompts: int = 64  # per step
    vocab_size: int = 0  # of the embedding; 0: the tokenizer's


MODELS = {
    "stories-teacher": TinyModel(hidden=128, layers=3, steps=1100, end="<|im_end|>", seed=1),
    "stories-student": TinyModel(hidden=128, layers=3, steps=450, end="<|endoftext|>", seed=2),
}


def cache_dir() -> Path:
    """Where made models are kept: $ONSTREAM_CACHE, else ~/.cache/onstream."""
    return Path(os.environ.get("ONSTREAM_CACHE") or Path.home() / ".cache" / "onstream")


def make_embedded_models(config: DictConfig) -> None:
    """Replace the names of embedded models in a config by their folders, making what is not there yet."""
    from trainers.distributed import rank

    for section in (config.model, config.teacher):
        if section.path in MODELS and not (section is config.teacher and config.trainer == "sft"):
            section.path = str(make(section.path, MODELS[section.path], quiet=rank() != 0))


def make(name: str, spec: TinyModel, quiet: bool = False) -> Path:
    """The folder of a tiny model, trained first if it is not in the cache. Ranks wait for the one that trains.

    The cache key holds everything the weights follow from: the spec and the code of the stories.

    Raises:
        ModelError: training failed; the message has the log's last line.
    """
    from filelock import FileLock

    source = (ROOT / "rollouts" / "stories.py").read_bytes() + json.dumps(asdict(spec)).encode()
    folder = cache_dir() / f"{name}-{hashlib.blake2b(source, digest_size=6).hexdigest()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "config.json").is_file():
            return folder
        if not quiet:
            print(f"making {name} ({spec.layers} layers, {spec.hidden} wide, {spec.steps} steps) in {folder}; once only",
                  flush=True)
        work = Path(f"{folder}.work")
        shutil.rmtree(work, ignore_errors=True)
        start = work / "start"
        initialise(start, spec)
        arguments = ["recipe=sft", f"model.path={start}", f"run.dir={work / 'run'}", f"seed={spec.seed}",
                     f"train.steps={spec.steps}", f"train.lr={spec.lr}", f"train.prompts_per_step={spec.prompts}",
                     f"data.stories={min(spec.steps * spec.prompts, 100_000)}", "engine=zero0", "log.wandb=disabled", "log.every=100",
                     "log.completions=0", "eval.every=-1"]
        environment = {key: value for key, value in os.environ.items()
                       if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                                      "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")
                       and not key.startswith("TORCHELASTIC")}
        environment["OMP_NUM_THREADS"] = str(os.cpu_count())  # torchrun sets 1; nothing else runs meanwhile
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], env=environment, cwd=ROOT,
                              stderr=subprocess.STDOUT if quiet else None,
                              stdout=subprocess.DEVNULL if quiet else None)
        made = work / "run" / "checkpoints" / f"step_{spec.steps}" / "model"
        if done.returncode or not made.is_dir():
            raise ModelError(f"the embedded {name} could not be trained (exit status {done.returncode}); the run is "
                             f"in {work / 'run'}")
        made.rename(folder)
        shutil.rmtree(work)
    return folder


def initialise(folder: Path, spec: TinyModel) -> None:
    """Write a randomly initialised model and its tokenizer."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(spec.end)
    torch.manual_seed(spec.seed)
    config = Qwen3Config(
        vocab_size=spec.vocab_size or len(tokenizer), hidden_size=spec.hidden, intermediate_size=3 * spec.hidden,
        num_hidden_layers=spec.layers, num_attention_heads=spec.hidden // 32, num_key_value_heads=spec.hidden // 32,
        head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(end: str):
    """A byte-level BPE of 512 tokens learned from stories, each digit a token of its own; any text encodes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rollouts.stories import story

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = []
    for index in range(2000):
        sample = story(0, index, "train", difficulty=4)
        texts += [f"user\n{sample.prompt}\nassistant\n", sample.solution]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>",
                                   model_max_length=2048)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> int:
    parser = argparse.ArgumentParser(description="make the embedded tiny models")
    parser.add_argument("--vocab-size", type=int, default=0, help="pad the embedding to this many rows, e.g. 151936")
    size = parser.parse_args().vocab_size
    for name, spec in MODELS.items():
        print(make(name, TinyModel(**{**asdict(spec), "vocab_size": size})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
