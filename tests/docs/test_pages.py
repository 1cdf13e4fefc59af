"""What the pages point to exists: links, anchors, files. The README is short."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
# Pages that are made by `python -m scripts.document`.
GENERATED = ("docs/config.md", "docs/metrics.md")
# Pages that tell of the past, where files had other names.
HISTORY = ("CHANGELOG.md", "docs/log.md")
README_LINES = 130
LINK = re.compile(r"(?<!\!)\[[^\]\[]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("recipes", "trainers", "rollouts", "rewards", "kernels", "scripts", "benchmarks")
FOLDERS += ("tests", "docs", ".ci")
PATH = re.compile(rf"`((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./{{}},*-]*|[\w]+\.(?:py|md))`")
# Dotted names of modules and of what is in them.
DOTTED = re.compile(rf"`(?:python -m )?((?:{'|'.join(FOLDERS[:7])})(?:\.\w+)+)`")


def files() -> set[str]:
    """The files and folders of the checkout, without what an installation or a run leaves there."""
    found = {path.name for path in ROOT.iterdir()}
    for folder in FOLDERS:
        found |= {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*")}
    return found


FILES = files()


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(path), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        text = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(1 for name in found if re.fullmatch(rf"{re.escape(text)}(-\d+)?", name))
        found.add(f"{text}-{count}" if count else text)
    return found


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` is two paths."""
    braces = re.search(r"\{([^}]*)\}", path)
    if not braces:
        return [path]
    before, after = path[: braces.start()], path[braces.end() :]
    return [name for part in braces[1].split(",") for name in expanded(before + part + after)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page):
    broken = []
    for match in LINK.finditer(prose(page)):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if name_of(target) in GENERATED and not target.exists():
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    "page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of
)
def test_named_files_exist(page):
    missing = []
    for match in PATH.finditer(prose(page)):
        for path in expanded(match[1]):
            # Words in capitals stand for values of the user's.
            if path in GENERATED or "NAME" in path:
                continue
            # A name without a folder may be that of a file anywhere.
            pattern = path.rstrip("/") if "/" in path else f"*{path}"
            if not any(fnmatch(name, pattern) for name in FILES):
                missing.append(path)
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of
)
def test_named_modules_exist(page):
    missing = []
    for match in DOTTED.finditer(prose(page)):
        module, _, name = match[1].rpartition(".")
        # The last part may be a class or a function of a module.
        if not file_of(match[1]) and not defines(file_of(module), name):
            missing.append(match[1])
    assert not missing


def file_of(module: str) -> str | None:
    """The file of a module, or the folder of a package."""
    path = module.replace(".", "/")
    return next(
        (name for name in (f"{path}.py", f"{path}/__init__.py", path) if name in FILES), None
    )


def defines(file: str | None, name: str) -> bool:
    """Whether a module has the name at its top level."""
    if file is None or not file.endswith(".py"):
        return False
    text = (ROOT / file).read_text("utf-8")
    return bool(re.search(rf"^(def|class) {name}\b|^{name}\b.*=|import .*\b{name}\b", text, re.M))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_points_to_what_is_not_in_the_repository(page):
    assert not re.search(r"(?<![\w-])methods\.md", page.read_text("utf-8"))


def test_the_changelogs_new_names_of_modules_exist():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    moved = text[text.index("#### Moved") : text.index("#### Added")]
    table = re.findall(r"^\| `\w+\..*\| (.*) \|$", moved, re.M)
    names = [
        name
        for cell in table
        for group in re.findall(r"`([^`]*)`", cell)
        for name in expanded(group)
    ]
    assert len(names) > 30
    missing = []
    for name in names:
        module, _, last = name.removesuffix(".…").rpartition(".")
        if name.startswith(FOLDERS[:7]) and not file_of(name.removesuffix(".…")):
            missing += [] if defines(file_of(module), last) else [name]
    assert not missing


def test_the_tests_that_show_a_promise_exist():
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    shown = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(shown) > 30
    for file, name in shown:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text("utf-8"), (file, name)
