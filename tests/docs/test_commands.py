"""The commands on the pages are right: their keys exist, and one of each kind runs in short form.

A new command needs a row in `SHORT`, or one in `NOT_RUN` with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.compose import compose
from trainers.core.metric_names import METRICS, entry

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = ("python", ".venv/bin/python")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: its path in the repository.
        text: the line.
        program: `train.py`, `torchrun`, `-m MODULE`, or what the line starts with.
        arguments: the words after it; of torchrun, those after train.py.
        ranks: of torchrun; else 1.
    """

    page: str
    text: str
    program: str
    arguments: tuple[str, ...]
    ranks: int = 1

    def value(self, key: str) -> str | None:
        """The value of the argument KEY=VALUE."""
        found = [word.partition("=")[2] for word in self.arguments if word.startswith(f"{key}=")]
        return found[-1] if found else None


def parse(page: str, text: str) -> Command:
    words = shlex.split(text, comments=True)
    if words[0] in PYTHON and words[1] == "-m":
        return Command(page, text, f"-m {words[2]}", tuple(words[3:]))
    if words[0] in PYTHON:
        return Command(page, text, words[1], tuple(words[2:]))
    if words[0] == "torchrun":
        script = words.index("train.py")
        ranks = int(words[1].removeprefix("--nproc_per_node="))
        return Command(page, text, "torchrun", tuple(words[script + 1 :]), ranks)
    if words[0] == "bash":
        return Command(page, text, words[1], tuple(words[2:]))
    return Command(page, text, words[0], tuple(words[1:]))


def commands() -> list[Command]:
    """The commands of all pages, each once."""
    found: dict[str, Command] = {}
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text("utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    command = parse(page, line)
                    found.setdefault(f"{command.program} {command.arguments}", command)
    return list(found.values())


COMMANDS = commands()
MODEL = "stories-student"
# Words in capitals stand for values of the user's.
PLACEHOLDERS = {
    "MODEL_DIR": MODEL,
    "TEACHER_DIR": "stories-teacher",
    "MATH_DIR": "stories-teacher",
    "CODE_DIR": "stories-student",
    "CACHE_DIR": "{work}/cache",
    "OTHER_DIR": "translation-untrained",
    "DATA": "{work}/stories.jsonl",
    # It would be fetched; tests/recipes/test_packaged_models.py fetches it.
    "smollm2-135m": MODEL,
    "TEXT_FILE": "{work}/text.txt",
    "OUT_DIR": "{work}/qwen2_audio",
    "outputs/mine/checkpoints/step_100/model": MODEL,
    "outputs/m30k/SPSD-0/checkpoints/step_2400/model": "translation-untrained",
    "outputs/mine": "{work}/mine",
    "outputs/poweropd/RUN": "{work}/run",
    "outputs/poweropd/OTHER": "{work}/other",
    "docs/results/multi30k/SPSD": "{work}/multi30k",
    "out=m30k": "out={work}/m30k",
}
# Of a kind of command: other values for placeholders.
PARALLEL = {"DATA": "{work}/parallel", "MODEL_DIR": "translation-untrained"}
OTHER_PLACEHOLDERS = {
    "train.py recipe=streaming_sft": {"DATA": "stories"},
    "train.py recipe=adasr": {"DATA": "stories", "MODEL_DIR": "stories-streaming"},
    "train.py recipe=proactivellm": PARALLEL,
    "-m scripts.evaluate mode=simultaneous": PARALLEL,
    "-m scripts.curves": PARALLEL,
    "-m scripts.interpret": PARALLEL,
    "-m scripts.new_model": PARALLEL | {"MODEL_DIR": "{work}/new_model"},
}
TRAIN = {
    "train.steps": "1",
    "train.prompts_per_step": "4",
    "train.minibatches": "1",
    "data.stories": "64",
    "rollout.max_new_tokens": "16",
    "eval.size": "2",
    "eval.every": "0",
    "eval.k": "1",
    "log.wandb": "disabled",
}
SAMPLED = TRAIN | {"rollout.engine": "hf"}
GROUPS = {"rollout.samples_per_prompt": "2"}
STREAMING = {"streaming.seconds_per_token": "0.01", "streaming.max_thought_tokens": "4"}
SIMULTANEOUS = {"proactive.calibration_size": "4"}
EVALUATED = {"k": "1", "size": "2", "max_new_tokens": "16"}
# A kind of command -> what shortens it: values of keys, or words that follow.
SHORT: dict[str, dict[str, str] | tuple[str, ...]] = {
    "train.py recipe=poweropd": SAMPLED,
    "train.py recipe=opd": SAMPLED,
    "train.py recipe=opd_jsd": SAMPLED,
    "train.py recipe=opsd": SAMPLED,
    "train.py recipe=onpolicy_sft": SAMPLED | GROUPS,
    "train.py recipe=grpo": SAMPLED | GROUPS,
    "train.py recipe=sft": TRAIN,
    # Before the run that reads what it writes.
    "-m scripts.cache_teacher": {"top_k": "4"},
    "train.py recipe=distill": TRAIN,
    "train.py recipe=streaming_sft": TRAIN | STREAMING,
    "train.py recipe=adasr": TRAIN | GROUPS | STREAMING,
    "train.py recipe=adasr_grpo": TRAIN | GROUPS | STREAMING,
    "train.py recipe=proactivellm": TRAIN | SIMULTANEOUS | {"proactive.curve": "[batch]"},
    "train.py dry_run=true": {},
    "train.py resume=auto": SAMPLED,
    "torchrun recipe=poweropd": SAMPLED,
    "-m scripts.evaluate": EVALUATED | {"engine": "hf"},
    "-m scripts.evaluate mode=streaming": EVALUATED | STREAMING,
    "-m scripts.evaluate mode=read_then_think": EVALUATED | STREAMING,
    "-m scripts.evaluate mode=simultaneous": EVALUATED | SIMULTANEOUS,
    "-m scripts.stream": {"pace": "0", "max_new_tokens": "16"},
    "-m scripts.interpret": SIMULTANEOUS | {"rollout.max_new_tokens": "8"},
    "-m scripts.curves": EVALUATED | SIMULTANEOUS | {"heads": "batch", "out": "{work}/curves.json"},
    "-m scripts.divergence": {"size": "1", "max_new_tokens": "8", "engine": "hf"},
    "-m scripts.inspect": {},
    "-m scripts.new_model": {},
    "-m scripts.remove_layers": {"layers": "1", "out": "{work}/two_layers"},
    "-m scripts.report": (),
    "-m benchmarks.streaming": ("--batch", "2", "--sentences", "1", "--repeats", "1"),
    "-m benchmarks.views": (
        "--sentences",
        "2",
        "--hidden",
        "32",
        "--layers",
        "1",
        "--repeats",
        "1",
    ),
}
# A kind of command -> why it is not run.
NOT_RUN = {
    "benchmarks/gpu.sh --out gpu.json": "needs a GPU; tests/benchmarks/test_gpu.py runs it in tiny",
    "scripts/quickstart.sh": "installs packages; tests/scripts/test_setup.py has its parts",
    "scripts/test.sh": "installs packages, and runs these tests",
    "scripts/test.sh fast": "runs these tests",
    ".ci/run": "runs these tests",
    "torchrun recipe=poweropd_paper": "needs GPUs and the hub",
    "torchrun recipe=onpolicy_sft_paper": "needs GPUs and the hub",
    "torchrun recipe=adasr_paper": "needs GPUs and the hub",
    "torchrun recipe=proactivellm_paper": "needs GPUs and the hub",
    "train.py recipe=proactivellm_speech": "needs the 7B model that the command before it splits",
    "-m scripts.split_qwen2_audio": "needs a 7B model; test_qwen2_audio.py splits a tiny one",
    "-m scripts.conform": "tests/trainers/test_objectives.py runs all its cases",
    "-m benchmarks.seeds": "whole runs, whose overrides are composed here",
    "train.py recipe=poweropd_lora": "fetches a model; test_lora.py trains adapters on tiny ones",
    "-m benchmarks.answers": "waits for time limits; tests/rewards/test_math.py has its pairs",
    "-m benchmarks.golden": "a run of each recipe; tests/trainers/test_golden.py runs it",
    "-m benchmarks.teacher_memory": "waits for engines of vLLM; test_colocated_teacher.py has one",
    "-m benchmarks.vs_trl": "installs TRL, and takes 40 minutes",
}
# Modules that compose a config of their arguments before they do anything.
COMPOSING = tuple(
    f"-m scripts.{name}"
    for name in ("evaluate", "curves", "stream", "interpret", "new_model", "cache_teacher")
)


def kind(command: Command) -> str:
    """What is run once of it: the program, and the argument that makes it another command."""
    if command.program in ("train.py", "torchrun"):
        for word in ("resume=auto", "dry_run=true"):
            if word in command.arguments:
                return f"{command.program} {word}"
        return f"{command.program} recipe={command.value('recipe')}"
    if command.program.startswith("-m"):
        mode = command.value("mode")
        return command.program + (f" mode={mode}" if mode else "")
    return " ".join([command.program, *command.arguments])


def filled(command: Command, work) -> list[str]:
    """The arguments with values in place of the placeholders."""
    values = PLACEHOLDERS | OTHER_PLACEHOLDERS.get(kind(command), {})
    names = sorted(values, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w/]){re.escape(name)}(?![\w])" for name in names))
    texts = [pattern.sub(lambda m: values[m[0]], word) for word in command.arguments]
    return [text.replace("{work}", str(work)) for text in texts]


def shortened(command: Command, work) -> list[str]:
    """The arguments of the short form."""
    words, short = filled(command, work), SHORT[kind(command)]
    if isinstance(short, tuple):
        return [*words, *short]
    if command.program in ("train.py", "torchrun") and "run.dir" not in short:
        folder = re.sub(r"\W+", "_", kind(command))
        short = {"run.dir": f"{work}/{folder}"} | short
    kept = [word for word in words if word.partition("=")[0] not in short]
    return [*kept, *(f"{key}={value}".replace("{work}", str(work)) for key, value in short.items())]


def one_of_each_kind() -> dict[str, Command]:
    """Of each kind that is run, the command with the most arguments."""
    found: dict[str, Command] = {}
    for command in sorted(COMMANDS, key=lambda c: len(c.arguments)):
        if kind(command) in SHORT:
            found[kind(command)] = command
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the user's files that the placeholders name."""
    folder = tmp_path_factory.mktemp("commands")
    rows = [
        {
            "question": f"Tom has {n} pens. He finds 2 more. How many pens has he?",
            "answer": f"{n + 2}",
        }
        | {"solution": f"Start: {n}. {n} + 2 = {n + 2}. The answer is \\boxed{{{n + 2}}}."}
        for n in range(10, 20)
    ]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("Tom has 12 pens. He finds 5 more. How many pens has he?\n")
    (folder / "parallel").mkdir()
    for split in ("train", "val", "test"):
        for language, text in (("en", "a dog and a cat"), ("de", "ein Hund und eine Katze")):
            (folder / "parallel" / f"{split}.{language}").write_text(f"{text}\n" * 6)
    row = {"step": 1, "train/loss": 0.5, "train/grad_norm": 1.0, "time/step": 1.0}
    for name in ("run", "other"):
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "multi30k").mkdir()
    curves = ROOT / "docs" / "results" / "multi30k" / "SPSD" / "curves.json"
    (folder / "multi30k" / "curves.json").write_text(curves.read_text())
    return folder


# Fast: what can be known without running


def test_every_command_is_run_or_has_a_reason_not_to_be():
    unknown = [c.text for c in COMMANDS if kind(c) not in SHORT.keys() | NOT_RUN.keys()]
    assert not unknown, f"give each a row in SHORT or NOT_RUN: {unknown}"
    assert not SHORT.keys() & NOT_RUN.keys()


def test_no_row_of_the_tables_is_left_over():
    kinds = {kind(command) for command in COMMANDS}
    assert not [name for name in (*SHORT, *NOT_RUN, *OTHER_PLACEHOLDERS) if name not in kinds]
    texts = "\n".join(command.text for command in COMMANDS)
    assert not [name for name in PLACEHOLDERS if name not in texts]


def test_every_placeholder_has_a_value(work):
    left = {word for c in COMMANDS for word in filled(c, "") if re.search(r"[=/][A-Z_]{3,}", word)}
    assert not left


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.program in ("train.py", "torchrun")], ids=lambda c: c.text
)
def test_the_keys_of_a_run_compose(command, work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(command.ranks))
    config = compose(filled(command, work))
    assert config.recipe == (command.value("recipe") or "poweropd")


class Composed(BaseException):
    """Ends a command when it has composed its config."""


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.program in COMPOSING], ids=lambda c: c.text
)
def test_the_keys_of_a_script_compose(command, work, monkeypatch):
    def compose_and_end(overrides):
        compose(overrides)
        raise Composed

    monkeypatch.setattr("recipes.compose.compose", compose_and_end)
    module = importlib.import_module(command.program.removeprefix("-m "))
    with pytest.raises(Composed):
        module.main(filled(command, work))


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.program.startswith("-m ")], ids=lambda c: c.text
)
def test_a_module_exists_and_has_the_options(command):
    module = importlib.util.find_spec(command.program.removeprefix("-m "))
    assert module, f"{command.page}: there is no such module"
    source = Path(module.origin.replace("__init__.py", "__main__.py")).read_text("utf-8")
    options = [word.partition("=")[0] for word in command.arguments]
    if command.program in COMPOSING or command.program == "-m benchmarks.seeds":
        options = [word for word in options if word.startswith("--")]
    if command.program == "-m scripts.report":
        options = []
    assert not [word for word in options if f'"{word}"' not in source]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.program == "-m benchmarks.seeds"], ids=lambda c: c.text
)
def test_the_settings_of_a_comparison_compose(command, work):
    settings = [word for word in filled(command, work) if re.match(r"[\w ,-]+: ", word)]
    assert settings
    for setting in settings:
        compose(setting.partition(": ")[2].split())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program.endswith(".sh")], ids=str)
def test_a_script_exists(command):
    assert (ROOT / command.program).is_file()


# Slow: one of each kind, in short form


@pytest.fixture(scope="module")
def run(command_server, environment):
    """Runs words as `python WORDS …` in a fork of one process; returns (status, output)."""

    def run(words: list[str]) -> tuple[int, str]:
        done = command_server(words).run(words, environment(1), timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_command_runs_in_short_form(name, run, work):
    command = one_of_each_kind()[name]
    words = shortened(command, work)
    if command.program == "torchrun":
        words = ["-m", "torch.distributed.run", "--nproc_per_node=1", "train.py", *words]
    else:
        words = [*command.program.split(), *words]
    status, output = run(words)
    assert status == 0, (
        f"{command.page}: {command.text}\nas python {' '.join(words)}\n{output[-3000:]}"
    )
    folder = next((word[8:] for word in words if word.startswith("run.dir=")), None)
    if folder and "dry_run=true" not in words:
        check_metrics(work / folder / "metrics.jsonl")


def check_metrics(file) -> None:
    """A run writes names of the table only, and has the times that golden files leave out."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    written = {entry(name) for row in rows for name in row}
    assert written <= METRICS.keys()
    evaluated = any(name.startswith("eval/") for name in written)
    times = {name for name in METRICS if name.startswith(("time/", "perf/"))}
    assert times & written == (times if evaluated else times - {"time/eval"})
