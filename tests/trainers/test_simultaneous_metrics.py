"""Quality and lag of simultaneous runs: delays of words, calibration, whole runs and their
curves."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from recipes.languages import characters
from rollouts.simultaneous.decision import character_starts, spellings, word_starts
from rollouts.simultaneous.prompts import target_cut, target_words
from rollouts.trajectory import Trajectory
from scripts.curves import main
from scripts.tiny_models import TinyModel, initialise
from trainers.modes.simultaneous import delays
from trainers.prepare import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation") / "model"
    initialise(
        folder,
        TinyModel(end="<|endoftext|>", steps=0, seed=0, hidden=64, layers=2, recipe="proactivellm"),
    )
    return folder


@pytest.fixture
def keys(model, tmp_path):
    return [
        "recipe=proactivellm",
        f"model.path={model}",
        "data.stories=40",
        "train.steps=3",
        "train.prompts_per_step=8",
        "train.warmup_steps=0",
        "eval.size=6",
        "proactive.calibration_size=5",
        "rollout.max_new_tokens=20",
        f"run.dir={tmp_path / 'run'}",
        "log.wandb=disabled",
    ]


def written(ids, reads, finish="stop", opening=1) -> Trajectory:
    return Trajectory(
        0,
        0,
        [5],
        [9] * opening + ids,
        finish,
        reads=np.array([0] * opening + reads),
        sampled=np.arange(opening + len(ids)) >= opening,
    )


# 0 and 3 go on with a word
STARTS = np.array([False, True, True, False, True, True, True, True, True, True])


@pytest.mark.parametrize(
    "ids, reads, finish, expected",
    [
        ([1, 2, 4, 7], [1, 2, 3, 4], "stop", [1, 2, 3]),  # the end is no word
        ([1, 2, 4, 7], [1, 2, 3, 4], "length", [1, 2, 3, 4]),
        (
            [1, 3, 0, 2, 7],
            [1, 1, 4, 5, 5],
            "stop",
            [4, 5],
        ),  # a word is there when its last token is
        ([3, 2, 7], [2, 2, 3], "stop", [2, 2]),  # the first token begins a word whatever it is
        ([7], [3], "stop", []),
    ],
)
def test_delays_of_words(ids, reads, finish, expected):
    assert delays(written(ids, reads, finish), STARTS).tolist() == expected


def test_word_starts_agree_with_the_text(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    starts = word_starts(tokenizer)
    text = "rarin lalun laxan nuxon, fuhun"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert int(starts[ids[1:]].sum()) == len(text.split()) - 1
    assert starts[tokenizer.eos_token_id]


def test_a_whole_run_with_its_curves(run_command, keys, tmp_path, capsys):
    done = run_command(
        "train.py",
        *keys,
        "proactive.curve=[batch,wait_k,entropy,attention,edatt]",
        "proactive.kl_weight=0.5",
        "proactive.schedules=2",
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps, evals = [r for r in rows if "train/loss" in r], [r for r in rows if "time/eval" in r]
    assert len(steps) == 3 and len(evals) == 2
    for row in steps:
        assert row["train/loss"] == pytest.approx(
            row["nll/batch"] + row["nll/stream"] + 0.5 * row["teacher/kl"], rel=1e-5
        )
        assert row["teacher/kl"] > 0
    assert {
        f"eval/translation/{name}"
        for name in (
            "avg@1",
            "bleu",
            "chrf",
            "f1",
            "exact",
            "rco",
            "ail",
            "al",
            "laal",
            "head_setting",
        )
    } <= evals[-1].keys()
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert {name: len(points) for name, points in curves["policies"].items()} == {
        "batch": 1,
        "wait_k": 9,
        "entropy": 12,
        "attention": 12,
        "edatt": 10,
    }
    batch, wait = curves["policies"]["batch"][0], curves["policies"]["wait_k"]
    assert batch["rco"] == 1 and wait[0]["rco"] < wait[4]["rco"] <= 1
    assert "Latency and quality" in (tmp_path / "run" / "report.html").read_text()
    model = tmp_path / "run" / "checkpoints" / "step_3" / "model"
    shown = run_command(
        "-m",
        "scripts.evaluate",
        "mode=simultaneous",
        f"model={model}",
        "data=translation",
        "size=6",
        "proactive.head=wait_k",
        "proactive.setting=3",
        "max_new_tokens=20",
    )
    assert shown.returncode == 0, shown.stderr
    scores = json.loads(shown.stdout.splitlines()[-1])
    assert scores["al"] == pytest.approx(wait[2]["al"]) and scores["bleu"] == pytest.approx(
        wait[2]["bleu"]
    )
    again = [
        f"model={model}",
        "data=translation",
        "size=6",
        "max_new_tokens=20",
        "heads=wait_k,edatt",
        "proactive.min_lag=2",
        "proactive.max_lag=2",
    ]
    assert main(again) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(
        (tmp_path / "run" / "curves.json").read_text()
    )
    added = json.loads((tmp_path / "run" / "curves.json").read_text())["policies"]
    assert added.keys() == {*curves["policies"], "edatt, lag 2 to 2"}
    assert added["entropy"] == curves["policies"]["entropy"]
    assert added["wait_k"] == wait  # a lag range is nothing to it
    # and leaves a head nothing else
    assert [p["al"] for p in added["edatt, lag 2 to 2"]] == [wait[1]["al"]] * 10
    assert main([*again[:2], "size=5", *again[3:]]) == 0
    assert json.loads((tmp_path / "run" / "curves.json").read_text())["policies"].keys() == {
        "wait_k",
        "edatt, lag 2 to 2",
    }  # of other data


def test_two_ranks_take_the_step_of_one(run_command, keys, tmp_path):
    rows = []
    for ranks in (0, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = run_command(
            "train.py",
            *keys,
            f"run.dir={folder}",
            "proactive.curve=[batch]",
            "eval.size=3",
            "proactive.calibration_size=1",
            "train.tokens_per_microbatch=100",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr
        rows.append(
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        )
        rows[-1].append(json.loads((folder / "curves.json").read_text())["policies"]["batch"][0])
    for one, two in zip(*rows, strict=True):
        names = [
            name
            for name in one
            if name.split("/")[0] in ("train", "nll", "teacher", "eval", "bleu", "al", "rco")
        ]
        assert names and all(one[name] == pytest.approx(two[name], rel=2e-4) for name in names)


@pytest.mark.parametrize(
    "row, said",
    [
        ({"en": " ", "de": "rarin"}, "'en' is empty"),
        ({"en": "rula", "de": ""}, "row 0 has an empty target"),
    ],
)
def test_an_empty_source_or_target(keys, tmp_path, row, said):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row) + "\n" + json.dumps({"en": "rula", "de": "rarin"}))
    with pytest.raises(DataError, match=said):
        prepare(
            compose(
                [
                    *keys,
                    "data.prompt_column=en",
                    "data.target_column=de",
                    f"data.path={data}",
                    "eval.every=-1",
                ]
            )
        )


def test_nothing_to_calibrate_on(keys, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    config = compose([*keys, f"proactive.calibration_path={empty}"])
    with pytest.raises(DataError, match="there are no rows in it"):
        run = prepare(config)
        run.mode.decision_head(run, None)


@pytest.mark.parametrize(
    "extra, said",
    [
        (["proactive.head=wait_k"], "proactive.head=wait_k needs proactive.setting"),
        (["proactive.setting=-1"], "proactive.setting=-1 must be 0 or more"),
        (["proactive.head=wait_q"], "wait_k"),
        (["proactive.quantile=1.5"], "proactive.quantile=1.5 must be between 0 and 1"),
        (
            ["proactive.min_lag=3", "proactive.max_lag=2"],
            "proactive.max_lag=2 must be at least proactive.min_lag=3",
        ),
        (["proactive.curve=[nothing]"], "nothing"),
        (["streaming.unit=letter"], "streaming.unit=letter"),
        (["rollout.engine=streaming"], "rollout.engine=simultaneous"),
    ],
)
def test_bad_settings_end_before_anything_loads(keys, extra, said):
    with pytest.raises(ConfigError, match=said):
        prepare(compose([*keys, *extra]))


# 3 goes on with a word of another script, 4 and 5 are the bytes of one character.
SPELLED = ["", "我们", "爱", "b", "\ufffd", "", " ", "。"]


@pytest.mark.parametrize(
    "ids, reads, expected",
    [
        ([1, 2], [3, 4], [3, 3, 4]),
        ([2, 3, 3], [3, 4, 5], [3, 5]),
        ([4, 5, 7], [1, 2, 3], [2, 3]),
        ([1, 6, 3, 2], [1, 2, 3, 4], [1, 1, 3, 4]),  # a space comes with what follows it
        ([5, 1], [1, 2], [1, 2, 2]),  # the first token begins a word, whatever it is
    ],
)
def test_delays_of_the_characters_of_a_text(ids, reads, expected):
    assert delays(written(ids, reads, "length"), STARTS, SPELLED).tolist() == expected


TEXTS = ("我爱北京。", "日本語、テスト3回", "今天 Bob 来了!", "我有12支")


def test_delays_are_as_many_as_a_text_has_characters(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        found = delays(written(ids, [8] * len(ids), "length"), STARTS, spellings(tokenizer))
        assert len(found) == len(characters(text))


def test_tokens_begin_characters(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert character_starts(tokenizer)[tokenizer("我爱，！").input_ids].sum() == 4
    pieces = Tokenizer(models.BPE({"我": 0, "我们": 1, "a": 2}, [], unk_token="a"))
    other = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>", unk_token="a")
    assert character_starts(other).tolist() == [1, 2, 1, 1]


def test_a_run_into_chinese_counts_characters(keys, tmp_path, run_command):
    """Two line-aligned files; the lags of what is written, and BLEU, are those of characters."""
    english = [f"I have {n} pens, and I love Beijing." for n in range(20)]
    chinese = [f"我有{n}支笔，而且我爱北京，真的很爱。" for n in range(20)]
    for language, lines in (("en", english), ("zh", chinese)):
        (tmp_path / f"train.{language}").write_text("".join(f"{line}\n" for line in lines))
    data = [f"data.path={tmp_path}/train", f"eval.path={tmp_path}/train", "proactive.curve=[batch]"]
    data += ["data.prompt_column=en", "data.target_column=zh", "rollout.max_new_tokens=60"]
    data += ["data.max_prompt_tokens=200", "train.steps=2"]
    run = prepare(compose(keys + data))
    assert run.mode.bleu_tokenizer == "zh"
    (prompt, *_) = run.eval_prompts
    assert len(prompt.segments) - 1 == len(english[0].split())
    ids = run.tokenizer(chinese[0]).input_ids
    assert run.mode.starts(run.tokenizer)[ids].sum() == len(characters(chinese[0])) - 1
    words = target_words(chinese[0], run.tokenizer, target_cut(run.config))
    assert len(words) == len(characters(chinese[0])) + 1  # the end
    # In a process of its own: DeepSpeed's groups may be gone in this one.
    done = run_command("train.py", *keys, *data)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bleu (zh) " in done.stdout
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert curves["measured"]["bleu_tokenizer"] == "zh"
