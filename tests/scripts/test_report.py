"""`scripts.report`: what a reader sees of a run directory, and what it must survive."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from scripts.report import write_report
from scripts.report.__main__ import main
from scripts.report.completions import MAX_TOKENS
from scripts.report.directory import read_run
from scripts.report.numbers import short, smoothed, thinned

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def write_run(
    path: Path, recipe: str = "poweropd", steps: int = 60, scale: float = 1.0, edit=lambda row: row
) -> Path:
    """A run directory of `steps` optimizer steps; gradient norms are about `scale`; `edit` changes
    each row."""
    path.mkdir(parents=True)
    wave = np.random.default_rng(0).random(steps + 1)
    rows = [
        {
            "step": 0,
            "eval/stories/avg@8": 0.25,
            "eval/stories/pass@8": 0.5,
            "eval/stories/length_mean": 40.0,
        }
    ]
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "train/loss": -0.1 + wave[step] / 50,
                "train/grad_norm": scale * (1 + wave[step]),
                "train/lr": 1e-3,
                "reward/mean": wave[step],
                "reward/std": 0.1,
                "rollout/length_mean": 50 + wave[step],
                "mismatch/kl": 1e-6,
                "teacher/kl": 0.3,
                "time/rollout": 1.0,
                "time/update": 0.5,
                "time/step": 2.0,
                "perf/tokens_per_second": 1234.0,
                "custom/knob": step / 10,
            }
        )
    rows[1] |= {"reward/by_position": [0.1, None, 0.3], "reward/by_position_bins": [0, 16, 32]}
    rows[-1] |= {"reward/by_position": [0.2, 0.2, 0.2], "reward/by_position_bins": [0, 16, 32]}
    rows.append(
        {
            "step": steps,
            "eval/stories/avg@8": 0.75,
            "eval/stories/pass@8": 0.9,
            "eval/stories/length_mean": 60.0,
        }
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(edit(row)) + "\n" for row in rows))
    samples = [
        {
            "step": step,
            "prompt": "1 + 1 = ?",
            "completion": "It is 2.",
            "answer": "2",
            "reward": 1.0,
            "correct": True,
            "finish_reason": "stop",
            "length": 4,
            "tokens": ["It", " is", " 2", "."],
            "token_rewards": [0.5, 0.0, -1.0, None],
        }
        for step in range(1, steps + 1)
    ]
    (path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (path / "config.yaml").write_text(f"recipe: {recipe}\ntrain:\n  steps: 100\n  lr: {scale}\n")
    return path


def text_of(page: str) -> str:
    """The words a reader sees: no tags, no styles, no scripts, single spaces."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def plots_of(page: str) -> dict[str, dict]:
    """What the page's script draws, by the title of the card."""
    found = re.findall(r"""role="img" aria-label="([^"]*)" data-plot='([^']*)'>""", page)
    return {title: json.loads(html.unescape(plot)) for title, plot in found}


def titles_of(page: str) -> list[str]:
    return re.findall(r'role="img" aria-label="([^"]*)"', page)


def plot_of(page: str, title: str) -> dict:
    return plots_of(page)[title]


def figure_of(page: str, title: str) -> str:
    """The words of the card with this title."""
    figures = re.findall(r"<figure.*?</figure>", page, re.S)
    return next(text_of(figure) for figure in figures if f'aria-label="{title}"' in figure)


class Balance(HTMLParser):
    """Raises on an element that is closed without being open; what stays open is in `open`."""

    void: ClassVar = {"meta", "br", "use", "path", "rect", "link"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag, self.getpos()


def test_accuracy_over_length_is_joined_in_the_order_of_the_steps(tmp_path):
    def edit(row):
        return row | {"eval/stories/efficiency": 1.0} if "eval/stories/avg@8" in row else row

    run = write_run(tmp_path / "run", edit=edit)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps(
                edit({"step": 90, "eval/stories/avg@8": 0.8, "eval/stories/length_mean": 30.0})
            )
            + "\n"
        )
    page = write_report(run).read_text()
    plot = plot_of(page, "Accuracy and length")
    assert plot["lines"][0]["x"] == [40, 60, 30] and plot["lines"][0]["y"] == [0.25, 0.75, 0.8]
    assert "step 0 at 40 tokens, step 90 at 30" in text_of(
        page
    ) and "Efficiency, % accuracy per token" in titles_of(page)


def test_summary_shows_the_values_of_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    page = write_report(run)
    assert page == run / "report.html" and [p.name for p in run.glob("*.html")] == ["report.html"]
    page = page.read_text()
    text = text_of(page)
    assert "Accuracy +50.0 pts 25.0% → 75.0%" in text
    assert "Mean length +50% 40 → 60 tokens" in text
    norms = read_run(run).series["train/grad_norm"][1]
    assert f"Gradient norm, median {np.median(norms):.3g} before clipping" in text
    assert "Step time, median 2 s rollout 1 · update 0.5 · other 0.5" in text
    assert "Tokens per second, median 1234" in text
    assert "Steps 60 of 100 0:02:00 in steps" in text
    assert "poweropd" in re.search("<h1>(.*?)</h1>", page, re.S)[1] and "run run" in text
    assert titles_of(page) == [
        "Held-out accuracy",
        "Reward, mean ± std",
        "Reward by position",
        "Response length",
        "Gradient norm",
        "Loss",
        "KL to the teacher",
        "Trainer against sampler",
        "Throughput",
        "Time per step",
    ]
    assert "knob" in text and "0.1 … 6" in text  # an unknown metric, under its prefix
    assert "train: steps: 100" in text


def test_page_is_whole_and_asks_the_network_for_nothing(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    checker = Balance()
    checker.feed(page)
    assert checker.open == []
    assert not re.search(r"https?:|<link|<img|<iframe|@import|url\((?!#)|\ssrc=", page)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'" in page
    ids = re.findall(r'<[a-z]+ id="([^"]*)"', page)
    for reference in re.findall(r'(?:href="|url\()#([\w-]+)', page):
        assert reference in page and (reference in ids or f'id="{reference}"' in page)


def test_text_from_the_run_is_escaped(tmp_path):
    run = write_run(
        tmp_path / "run",
        recipe='"<b>bo\'ld</b>"',
        edit=lambda row: row | {"<i>x/<u>y": 1.0, "eval/<s>/avg@2": 0.5},
    )
    evil = "<script>alert('owned')</script></div></script>\ud800 $x$"
    row = {
        "step": 1,
        "prompt": evil,
        "completion": evil,
        "answer": evil,
        "finish_reason": evil,
        "correct": False,
        "reward": None,
    }
    tokens = row | {"tokens": [evil, evil], "token_rewards": [1, -1]}
    (run / "completions.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(tokens) + "\n")
    page = write_report(run).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(&#39;owned&#39;)" in page
    assert "<b>bo" not in page and "<u>y" not in page and "<s>" not in page
    assert "✗ incorrect" in page
    assert page.count("</script>") == 1
    checker = Balance()
    checker.feed(page)
    assert checker.open == []


def test_gaps_for_null_nan_and_infinity(tmp_path):
    def edit(row):
        bad = {20: math.nan, 21: None, 22: math.inf, 23: "NaN"}
        return (
            row | {"train/loss": bad[row["step"]]}
            if row["step"] in bad and "train/loss" in row
            else row
        )

    page = write_report(write_run(tmp_path / "run", edit=edit)).read_text()
    loss, norm = (plot_of(page, title)["lines"][0] for title in ("Loss", "Gradient norm"))
    for curve in ("y", "trend"):  # faint and bold
        gaps = [step for step, value in zip(loss["x"], loss[curve]) if value is None]
        assert gaps == [20, 21, 22, 23] and None not in norm[curve]
    assert "NaN" not in json.dumps(plots_of(page))


def test_broken_lines_are_skipped_and_a_step_logged_twice_keeps_its_last_value(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '[1, 2]\n{"no": "step"}\n{"step": 60, "train/loss": 7.0}\n{"step": 61, "train/lo'
        )
    with (run / "completions.jsonl").open("a") as file:
        file.write('{"step": 99, "prompt": "half a li')
    read = read_run(run)
    assert read.skipped == 3
    assert (
        read.series["train/loss"][0].tolist() == list(range(1, 61))
        and read.series["train/loss"][1][-1] == 7.0
    )
    assert [step for step, _ in read.samples] == [1, 31, 60]
    page = write_report(run).read_text()
    assert "3 unreadable lines of metrics.jsonl skipped" in page and "half a li" not in page


def test_token_rewards_colour_the_completion(tmp_path):
    run = write_run(tmp_path / "run")
    page = write_report(run).read_text()
    body = re.search(r'class="text completion">(.*?)</div>', page, re.S)[1]
    assert re.sub("<[^>]*>", "", body) == "It is 2."
    assert '<i class="p3" title="0.5">It</i>' in body and '<i class="n5" title="−1"> 2</i>' in body
    assert body.endswith("</i>.")  # a token without a reward is not marked
    assert page.count("✓ correct") == 3 and text_of(page).count("1 + 1 = ?") == 3
    long = {
        "step": 1,
        "completion": "x",
        "tokens": ["a"] * (MAX_TOKENS + 7),
        "token_rewards": [0.1] * (MAX_TOKENS + 7),
    }
    (run / "completions.jsonl").write_text(json.dumps(long))
    assert "… 7 more" in write_report(run).read_text()
    plain = {
        "step": 1,
        "completion": "no <tokens> here",
        "tokens": ["a"],
        "token_rewards": "none",
        "answer": 12345,
    }
    (run / "completions.jsonl").write_text(json.dumps(plain))
    page = write_report(run).read_text()
    assert (
        "no &lt;tokens&gt; here" in page
        and "answer <b>12345</b>" in page
        and "Token reward" not in page
    )


def test_a_streaming_run(tmp_path):
    row = {
        "rollout/streaming_length_mean": 9.0,
        "rollout/deep_length_mean": 20.0,
        "rollout/skip_frac": 0.25,
        "reward/format": 0.9,
        "reward/thinking": 1.1,
        "eval/s/streaming_length_mean": 8.0,
        "eval/s/deep_length_mean": 19.0,
        "eval/s/skip_frac": 0.5,
        "eval/s/latency_s": 0.75,
    }
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s} | row) + "\n" for s in (1, 2))
    )
    sample = {
        "step": 1,
        "prompt": "Read.<SEP>Why?<EOQ>A < B.<EOS>",
        "completion": "<SEP><EOQ>a<EOT><skip>d<EOR>e",
    }
    (tmp_path / "completions.jsonl").write_text(json.dumps(sample))
    page = write_report(tmp_path).read_text()
    assert titles_of(page) == [
        "Format and thinking rewards",
        "Streaming and deep length",
        "Held-out streaming and deep length",
        "Skipped share",
        "Latency",
    ]
    names = [[line["name"] for line in plot_of(page, title)["lines"]] for title in titles_of(page)]
    assert names == [
        ["format", "thinking"],
        ["streaming length mean", "deep length mean"],
        ["streaming length mean", "deep length mean"],
        ["rollouts", "held-out s"],
        ["latency s"],
    ]
    assert "Latency +0% 0.75 → 0.75 s" in text_of(page)
    prompt, completion = (
        re.search(f'class="text {name}">(.*?)</div>', page, re.S)[1]
        for name in ("prompt", "completion")
    )
    assert (
        re.sub("</?b[^>]*>", "", prompt)
        == "Read.&lt;SEP&gt;\nWhy?&lt;EOQ&gt;\nA &lt; B.&lt;EOS&gt;\n"
    )
    assert 'a<b class="mark">&lt;EOT&gt;</b>\n<b class="mark">&lt;skip&gt;</b>\nd<b' in completion


def write_curves(path: Path, policies: dict, **head) -> Path:
    """A `curves.json` in a directory, which need not be there; `head` changes what it says besides
    its policies."""
    path.mkdir(parents=True, exist_ok=True)
    curves = {"data": "en-de", "quality": "bleu", "lag": "al", "policies": policies} | head
    (path / "curves.json").write_text(json.dumps(curves))
    return path


def table_of(page: str) -> list[list[str]]:
    """The rows of the table of figures."""
    table = re.search(r'<table class="figures".*?</table>', page, re.S)[0]
    rows = re.findall("<tr>.*?</tr>", table, re.S)
    return [[text_of(cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]


def test_quality_over_lag_of_each_policy(tmp_path):
    run = write_run(tmp_path / "run")
    without = write_report(run).read_text()
    write_curves(
        run,
        {
            "wait-k": [
                {"setting": 5, "bleu": 21.5, "chrf": 50.0, "al": 4.75, "rco": 0.5},
                {"setting": 1, "bleu": 10.25, "al": 0.8123},
            ],
            "entropy": [{"setting": "q=0.9", "bleu": 23.624, "al": -3.0, "laal": 3.5}],
            "batch": [{"bleu": 27.34, "al": 18}],
        },
    )
    page = write_report(run).read_text()
    plot = plot_of(page, "Latency and quality · en-de")
    assert [(line["name"], line["color"], line["x"], line["y"]) for line in plot["lines"]] == [
        ("wait-k", "c1", [0.812, 4.75], [10.25, 21.5]),
        ("entropy", "c2", [-3], [23.62]),
        ("batch", "c3", [18], [27.34]),
    ]
    # unit, then the legend, then the axis
    figure = figure_of(page, "Latency and quality · en-de")
    assert "BLEU wait-k entropy batch AL, source units" in figure
    assert table_of(page) == [
        ["policy", "setting", "AL", "BLEU", "chrF", "RCO", "LAAL"],
        ["wait-k", "1", "0.81", "10.25", "–", "–", "–"],
        ["wait-k", "5", "4.75", "21.50", "50.00", "0.500", "–"],
        ["entropy", "q=0.9", "−3.00", "23.62", "–", "–", "3.50"],
        ["batch", "–", "18.00", "27.34", "–", "–", "–"],
    ]
    # the other cards stay as they are
    assert titles_of(page) == ["Latency and quality · en-de", *titles_of(without)]
    checker = Balance()
    checker.feed(page)
    assert checker.open == []


def test_curves_alone_make_a_report(tmp_path):
    policies = {"<b>batch": [{"rco": 1.0, "f1": 0.7, "<i>": 1}]}
    main([str(write_curves(tmp_path / "run", policies, quality="f1", lag="rco", data=""))])
    page = (tmp_path / "run/report.html").read_text()
    # the name of the only policy, and the axis
    assert titles_of(page) == ["Latency and quality"]
    assert "Latency and quality F1 &lt;b&gt;batch RCO" in text_of(page)
    assert "source units" not in page
    assert "<b>batch" not in page.replace("<b>&lt;b&gt;batch", "") and "<i>" not in page


def test_missing_figures_are_gaps_in_the_curve_and_dashes_in_the_table(tmp_path):
    points = [
        {"setting": 4, "al": 4, "bleu": 24},
        {"setting": 2, "al": 2, "bleu": math.nan},
        {"setting": 1, "al": 1, "bleu": 21},
        {"setting": 9, "al": None, "bleu": 29},
        {"setting": 8, "bleu": "28", "al": 8},
        {},
        None,
        7,
    ]
    policies = {"wait-k": points, "none": [], "null": None, "no lag": [{"bleu": 3}]}
    page = write_report(write_curves(tmp_path, policies)).read_text()
    lines = plot_of(page, "Latency and quality · en-de")["lines"]
    assert [(line["name"], line["x"], line["y"]) for line in lines] == [
        ("wait-k", [1, 2, 4, 8], [21, None, 24, None])
    ]
    assert table_of(page)[1:] == [
        ["wait-k", "1", "1.00", "21.00"],
        ["wait-k", "2", "2.00", "–"],
        ["wait-k", "4", "4.00", "24.00"],
        ["wait-k", "8", "8.00", "–"],
        ["wait-k", "9", "–", "29.00"],
        ["wait-k", "–", "–", "–"],
        ["no lag", "–", "–", "3.00"],
    ]
    assert "nan" not in page


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"policies": [1]}',
        '{"policies": {"a": 1, "b": [2], "c": [{"al": 1}]}}',
        '{"policies": {}}',
        '{"data": 3, "quality": "f1", "lag": [], "policies": {"a": [{"al": 1, "bleu": 2}]}}',
    ],
)
def test_curves_that_say_nothing_are_left_out(tmp_path, text):
    run = write_run(tmp_path / "run", steps=3)
    before = write_report(run).read_text()
    (run / "curves.json").write_text(text)
    assert write_report(run).read_text() == before


def test_curves_of_two_runs_share_a_card_where_their_axes_are_the_same(tmp_path):
    point = {"al": 1, "bleu": 2.0, "chrf": 3.0}
    first, second = (
        write_curves(write_run(tmp_path / name, recipe=name), {"wait-k": [point], "batch": [point]})
        for name in "ab"
    )
    page = write_report(first, second).read_text()
    lines = plot_of(page, "Latency and quality · en-de")["lines"]
    assert [(line["name"], line["color"]) for line in lines] == [
        ("a wait-k", "c1"),
        ("a batch", "c1"),
        ("b wait-k", "c2"),
        ("b batch", "c2"),
    ]
    assert [row[0] for row in table_of(page)] == [
        "policy",
        "a wait-k",
        "a batch",
        "b wait-k",
        "b batch",
    ]
    write_curves(second, {"wait-k": [point]}, quality="chrf", data="en-fr")
    titles = titles_of(write_report(first, second).read_text())
    assert titles[:2] == ["Latency and quality · en-de", "Latency and quality · en-fr"]


def test_two_runs_are_overlaid_and_summarised_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe="opd", scale=50.0)
    assert main([str(first), str(second)]) == 0
    assert not (second / "report.html").exists()
    page = (first / "report.html").read_text()
    plot = plot_of(page, "Gradient norm")
    assert [(line["name"], line["color"]) for line in plot["lines"]] == [
        ("poweropd", "c1"),
        ("opd", "c2"),
    ]
    assert plot["log"] and plot_of(page, "Trainer against sampler")["log"]
    assert not plot_of(page, "Loss")["log"]
    norms = [
        short(np.median(read_run(run).series["train/grad_norm"][1])) for run in (first, second)
    ]
    text = text_of(page)
    assert f"Gradient norm, median {norms[0]} before clipping {norms[1]} before clipping" in text
    # only settings that differ are listed
    assert "train.lr 1.0 50.0" in text and "train.steps" not in text
    assert text.count("Configuration") == 3  # the link, then one of each run
    alone = plot_of(write_report(second).read_text(), "Gradient norm")
    assert not alone["log"] and [line["color"] for line in alone["lines"]] == ["c1"]


def test_runs_of_one_recipe_are_told_apart_by_their_folders(tmp_path):
    first, second = write_run(tmp_path / "a", steps=3), write_run(tmp_path / "b", steps=3)
    (second / "completions.jsonl").unlink()
    page = write_report(first, second, first).read_text()
    assert [line["name"] for line in plot_of(page, "Loss")["lines"]] == [
        str(first),
        str(second),
        str(first),
    ]
    page = write_report(first, second).read_text()
    assert [line["name"] for line in plot_of(page, "Loss")["lines"]] == [
        "poweropd/a",
        "poweropd/b",
    ]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "completions.jsonl", "config.yaml", "all"])
def test_missing_files_leave_their_sections_out(tmp_path, missing):
    run = write_run(tmp_path / "run", steps=5)
    for path in list(run.iterdir()):
        if missing in (path.name, "all"):
            path.unlink()
    text = text_of(write_report(run).read_text())
    assert ("Gradient norm" in text) == (missing not in ("metrics.jsonl", "all"))
    assert ("✓ correct" in text) == (missing not in ("completions.jsonl", "all"))
    assert ("train: steps: 100" in text) == (missing not in ("config.yaml", "all"))
    assert ("No metrics were logged yet." in text) == (missing in ("metrics.jsonl", "all"))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"train/loss": 1.0},
        {"reward/std": 1.0},
        {"reward/mean": None},
        {"mismatch/kl": 0.0},
        {"mismatch/kl": -1e-7},
        {"mismatch/kl": 2e-4},
        {"time/rollout": None, "time/step": 3},
        {"time/step": 3},
        {"time/other": 1, "time/step": 3},
        {"reward/by_position": [None, None]},
        {"reward/by_position": []},
        {"reward/by_position": [1, 2], "reward/by_position_bins": [5]},
        {"reward/by_position": "x"},
        {"train/grad_norm": 0},
        {"eval/a/b/avg@4": 31.2, "eval/c/avg@4": 0.5},
        {"lr": 1e-5},
        {"eval/s/rco": 0.9, "eval/s/al": 3, "eval/s/laal": 4, "eval/s/latency_s": 1},
        {"train/tokens": 10**400, "teacher/kl": True},
        {"wandb": {"nested": 1}, "note": "text"},
        {"rollout/length_mean": 0.0},
        {"perf/peak_memory_gib": 3, "perf/tokens_per_second": 2},
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_any_subset_of_metrics_makes_a_page(tmp_path, row, steps):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s} | row) + "\n" for s in range(steps))
    )
    page = write_report(tmp_path).read_text()
    assert "nan" not in page.replace("nano", "") and len(titles_of(page)) == len(plots_of(page))


def test_datasets_get_a_card_and_a_tile_each(tmp_path):
    row = {"eval/a/avg@4": 31.2, "eval/b/avg@16": 0.5, "eval/b/pass@4": 0.75}
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s} | row) + "\n" for s in (0, 9))
    )
    page = write_report(tmp_path).read_text()
    assert titles_of(page) == ["Held-out accuracy · a", "Held-out accuracy · b"]
    assert [line["name"] for line in plot_of(page, "Held-out accuracy · b")["lines"]] == [
        "avg@16",
        "pass@4",
    ]
    text = text_of(page)  # a score over 1 is no share
    assert "Accuracy · a +0% 31.2 → 31.2" in text and "Accuracy · b +0.0 pts 50.0% → 50.0%" in text


def test_without_evaluation_the_tiles_compare_the_ends_of_the_rollouts(tmp_path):
    rows = [
        {
            "step": s,
            "reward/accuracy": s / 100,
            "rollout/length_mean": 100.0 - s,
            "rollout/truncated_frac": s / 100,
        }
        for s in range(1, 41)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = text_of(write_report(tmp_path).read_text())  # a 20th of the steps at either end
    assert "Accuracy +38.0 pts 1.5% → 39.5% reward/accuracy, first → last 2 steps" in text
    assert (
        "Mean length −39% 98.5 → 60.5 tokens" in text and "Truncated +38.0 pts 1.5% → 39.5%" in text
    )


def test_metrics_of_one_card_have_a_colour_each(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    plot = plot_of(page, "Held-out accuracy")
    assert [(line["name"], line["color"], line["y"]) for line in plot["lines"]] == [
        ("avg@8", "c1", [0.25, 0.75]),
        ("pass@8", "c2", [0.5, 0.9]),
    ]


def test_smoothing_keeps_constants_gaps_and_length():
    y = np.full(300, 3.0)
    y[100:103] = math.nan
    for log in (False, True):
        np.testing.assert_allclose(smoothed(y, log), y)
    spike = np.zeros(300)
    spike[150] = 13.0
    assert smoothed(spike)[150] == pytest.approx(1.0) and smoothed(spike).sum() == pytest.approx(
        13.0
    )


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.5, "", "0.5"),
        (-0.00123, "", "−0.00123"),
        (1.5e-7, "", "1.5e−7"),
        (1234.4, "", "1234"),
        (56789, "", "56.8k"),
        (0.12345, "%", "12.3%"),
        (None, "", "–"),
        (math.nan, "s", "–"),
        (2, "s", "2 s"),
        (0, "", "0"),
        ("as it is", "", "as it is"),
    ],
)
def test_numbers_as_text(value, unit, text):
    assert short(value, unit) == text


def test_first_step_off_the_scale_is_said(tmp_path):
    def slow(row):
        return row | {"time/rollout": 40.0} if row["step"] == 1 else row

    page = write_report(write_run(tmp_path / "run", edit=slow)).read_text()
    assert "40.5 s at step 1 is off the scale" in text_of(page)
    assert plot_of(page, "Time per step")["top"] < 4


def test_command_line_errors_are_one_line(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.report", str(run), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1 and done.stdout == "" and not (run / "report.html").exists()
    advice = "no metrics.jsonl here; give a run directory (run.dir of a training run)"
    assert done.stderr == f"error: {tmp_path}: {advice}\n"


def test_import_is_light_and_nothing_draws_in_python(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    code = f"""
import sys, scripts.report
from pathlib import Path
assert not {{"jinja2", "yaml", "torch"}} & set(sys.modules)
scripts.report.write_report(Path({str(run)!r}))
assert not {{"matplotlib", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_three_hundred_steps_are_quick_and_small(tmp_path):
    run = write_run(tmp_path / "run", steps=300)
    write_report(run)  # loads jinja2
    start = time.process_time()
    page = write_report(run)
    assert time.process_time() - start < 5
    assert page.stat().st_size < 5e5
    assert page.read_bytes() == write_report(run).read_bytes()


def test_the_page_of_a_long_run_is_no_larger_and_keeps_its_spikes(tmp_path):
    def edit(row):
        return row | {"train/loss": 99.0} if row["step"] == 7777 and "train/loss" in row else row

    short_run, long_run = (
        write_run(tmp_path / name, steps=steps, edit=edit)
        for name, steps in (("short", 500), ("long", 10_000))
    )
    page = write_report(long_run).read_text()
    assert len(page) < 1.5 * len(write_report(short_run).read_text())
    loss = plot_of(page, "Loss")["lines"][0]
    assert len(loss["x"]) == len(loss["y"]) == len(loss["trend"]) < 700
    assert loss["y"][loss["x"].index(7777)] == 99 and max(loss["trend"]) < 2
    assert loss["x"][0] < 50 and loss["x"][-1] > 9950


def test_thinning_keeps_extremes_gaps_and_short_series():
    values = np.zeros(6000)
    values[[1234, 4321]], values[3000] = (5, -5), math.nan
    kept = thinned(values, bins=100)
    assert {1234, 4321, 3000} <= set(kept) and len(kept) <= 202 and (np.diff(kept) > 0).all()
    assert thinned(values[:150], bins=100).tolist() == list(range(150))
    assert thinned(np.array([])).tolist() == []


def test_the_layers_of_a_long_run_keep_the_same_steps_and_the_spike(tmp_path):
    """They were thinned one by one, so that a layer could lie below the one under it."""

    def edit(row):
        if "time/step" not in row:
            return row
        wave = row["reward/mean"]
        spike = 5.0 if row["step"] == 777 else 0.0
        phases = {"time/rollout": 1 + wave, "time/update": 2 - wave + spike}
        return row | phases | {"time/step": 3.0 + spike}

    page = write_report(write_run(tmp_path / "run", steps=1200, edit=edit)).read_text()
    layers = plot_of(page, "Time per step")["lines"]
    steps = {tuple(line["x"]) for line in layers}
    assert len(layers) > 1 and len(steps) == 1 and 777 in steps.pop()


def test_a_band_and_the_layers_of_a_step(tmp_path):
    page = write_report(write_run(tmp_path / "run", steps=5)).read_text()
    reward = plot_of(page, "Reward, mean ± std")["lines"][0]
    assert np.allclose(np.subtract(reward["high"], reward["y"]), 0.1, atol=1e-3)
    assert np.allclose(np.subtract(reward["y"], reward["low"]), 0.1, atol=1e-3)
    layers = plot_of(page, "Time per step")["lines"]
    assert [(line["name"], line["y"][0], line["high"][0]) for line in layers] == [
        ("rollout", 1.0, 1.0),
        ("update", 0.5, 1.5),
        ("other", 0.5, 2.0),
    ]
    assert not any("low" in line for line in layers)  # so they begin at zero


def test_the_script_reads_every_field_and_the_style_has_every_colour(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    script = page[page.rindex("<script>") :]
    plots = plots_of(page).values()
    lines = [line for plot in plots for line in plot["lines"]]
    fields = {key for fields in (*plots, *lines) for key in fields}
    assert {"lines", "log", "top", "unit", "name", "y", "trend", "low", "high"} <= fields
    assert {field for field in fields if not re.search(rf"\b{field}\b", script)} == set()
    for color in {line["color"] for line in lines}:
        assert page.count(f"--{color}: ") == 2  # for the light and for the dark theme


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: looks at what the page's script draws")
def test_a_browser_draws_every_chart(tmp_path):
    def edit(row):
        return row | {"train/loss": None} if 20 <= row["step"] < 25 and "train/loss" in row else row

    run = write_curves(
        write_run(tmp_path / "run", edit=edit), {"wait-k": [{"al": 1, "bleu": 2}, {"al": 2}]}
    )
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000")
    page = subprocess.run(
        [CHROMIUM, *flags, "--window-size=1300,3000", "--dump-dom", write_report(run).as_uri()],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "HOME": str(tmp_path)},
    ).stdout
    plots = dict(re.findall(r'aria-label="([^"]*)"[^>]*>(<svg>.*?</svg>)', page, re.S))
    assert list(plots) == titles_of(page) and len(plots) > 9
    for svg in plots.values():
        assert re.search(r'class="(curve dash0|layer)" d="M\d', svg) and "NaN" not in svg
        assert len(re.findall("<text", svg)) >= 3
    curve, faint = (
        re.search(rf'class="{name}[^"]*" d="([^"]*)"', plots["Loss"])[1]
        for name in ("curve", "faint")
    )
    assert curve.count("M") == faint.count("M") == 2  # a gap divides it
    assert plots["Latency and quality · en-de"].count("<circle") == 1
    assert plots["Time per step"].count('class="layer"') == 3
