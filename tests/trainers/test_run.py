"""Whole runs as a user starts them: real vLLM, real DeepSpeed, tiny random models."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.compare_runs import differences

FIXED = {
    "step",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/tokens",
    "reward/mean",
    "reward/std",
    "reward/min",
    "reward/max",
    "reward/accuracy",
    "rollout/length_mean",
    "rollout/truncated_frac",
    "rollout/entropy",
    "mismatch/logp_abs_mean",
    "mismatch/kl",
    "mismatch/ess",
    "teacher/kl",
    "teacher/agreement",
    "time/rollout",
    "time/annotate",
    "time/update",
    "time/sync",
    "time/step",
    "perf/tokens_per_second",
    "perf/peak_memory_gib",
}
EVAL = {
    "eval/stories/avg@2",
    "eval/stories/pass@2",
    "eval/stories/length_mean",
    "eval/stories/truncated_frac",
}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> dict[int, dict]:
    return {row["step"]: row for row in rows(run) if "train/loss" in row}


@pytest.fixture(scope="module")
def finished(tiny_models, run_command, tmp_path_factory):
    """One run of eight steps with vLLM, checkpoints every two, W&B offline."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_command("train.py", *base(tiny_models, run))
    assert done.returncode == 0, done.stderr[-3000:]
    return run, done


def base(tiny_models, run) -> list[str]:
    return [
        "recipe=poweropd",
        f"model.path={tiny_models['student']}",
        f"teacher.path={tiny_models['teacher']}",
        f"run.dir={run}",
        "train.steps=8",
        "train.prompts_per_step=8",
        "data.stories=40",
        "rollout.max_new_tokens=12",
        "eval.size=4",
        "eval.k=2",
        "eval.every=4",
        "checkpoint.every=2",
        "train.tokens_per_microbatch=150",
    ]


def test_the_run_directory_is_as_promised(finished):
    run, done = finished
    trained, evaluated = steps(run), [row for row in rows(run) if "train/loss" not in row]
    assert sorted(trained) == list(range(1, 9)) and [row["step"] for row in evaluated] == [0, 4, 8]
    for row in trained.values():
        assert row.keys() >= FIXED, FIXED - row.keys()
        assert all(row[name] is not None for name in FIXED)
    for row in evaluated:
        assert row.keys() >= EVAL
    assert (run / "config.yaml").read_text().startswith("recipe: poweropd")
    samples = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == set(range(1, 9))
    assert all(len(s["tokens"]) == len(s["token_rewards"]) == s["length"] for s in samples)
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    report = (run / "report.html").read_text()
    assert "poweropd" in report and "<svg" in report
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_6", "step_8"]
    assert "step 8/8" in done.stdout and "report" in done.stdout


def test_the_trainer_and_the_sampler_agree(finished):
    for row in steps(finished[0]).values():
        assert (
            row["mismatch/logp_abs_mean"] < 1e-5
            and row["mismatch/kl"] < 1e-8
            and row["mismatch/ess"] > 0.9999
        )


def test_the_exported_model_gives_the_same_greedy_answers_in_transformers_and_vllm(finished):
    from recipes.compose import compose
    from rollouts.engines.vllm import VllmEngine
    from rollouts.trajectory import Request, Sampling

    folder = finished[0] / "checkpoints" / "step_8" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    engine = VllmEngine(
        str(folder), compose([]), torch.device("cpu"), torch.float32, max_length=128
    )
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Mia has {n} shells."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for n in range(5)
    ]
    for text in prompts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        theirs = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :].tolist()
        stops = tuple(model.generation_config.eos_token_id)
        ours = engine.generate(
            [Request(0, 0, tuple(ids[0].tolist()), 0)],
            Sampling(16, temperature=0.0, stop_ids=stops),
        )[0].completion_ids
        assert ours == theirs
    engine.close()


def test_a_run_killed_after_step_5_resumes_to_the_same_numbers(
    finished, tiny_models, start_command, run_command, tmp_path
):
    whole, run = finished[0], tmp_path / "killed"
    command = ["train.py", *base(tiny_models, run)]
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
    with start_command(*command) as started:
        while not (metrics.exists() and '{"step": 5,' in metrics.read_text()):
            assert time.monotonic() < deadline, "the run ended before step 5"
            time.sleep(0.005)
        os.kill(started.pids[0], signal.SIGKILL)
        assert started.wait(60).returncode == -signal.SIGKILL, "the run ended before it was killed"
    done = run_command(*command, "resume=auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resume  from" in done.stdout
    assert differences(run, whole) == []


def test_two_ranks_under_zero3_see_what_one_rank_sees(finished, tiny_models, run_command, tmp_path):
    run = tmp_path / "zero3"
    done = run_command(
        "train.py",
        *base(tiny_models, run),
        "engine=zero3",
        "train.steps=2",
        "log.wandb=disabled",
        "checkpoint.every=0",
        ranks=2,
        timeout=400,
        new_process=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = steps(run), steps(finished[0])
    # same prompts and seeds: same samples, rewards and gradient, up to summation order
    for step in (1, 2):
        for name in ("train/loss", "train/grad_norm", "reward/mean", "rollout/length_mean"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-3, abs=1e-6), (
                step,
                name,
            )
        assert ours[step]["mismatch/logp_abs_mean"] < 1e-5
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_2" / "model")


@pytest.mark.parametrize(
    "changes",
    [
        ("recipe=opd_zscore", "engine=zero0"),
        ("recipe=opd_topk", "divergence.top_k=20", "engine=zero2"),
        ("recipe=poweropd_full", "reward.terminal_stop=raw"),
        (
            "recipe=poweropd",
            "reward.terminal_stop=cross_eos",
            "model.dtype=bfloat16",
            "teacher.dtype=bfloat16",
            "model.gradient_checkpointing=true",
        ),
    ],
)
def test_the_rest_of_the_family_runs_without_vllm(changes, tiny_models, run_command, tmp_path):
    arguments = [a for a in base(tiny_models, tmp_path / "run") if not a.startswith("recipe=")]
    done = run_command(
        "train.py",
        *arguments,
        "rollout.engine=hf",
        "train.steps=2",
        "log.wandb=disabled",
        "eval.every=-1",
        *changes,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(steps(tmp_path / "run")) == 2


def test_a_run_on_real_text_drops_overlong_prompts_and_scores_the_rest(
    tiny_models, run_command, tmp_path
):
    data = tmp_path / "gsm.jsonl"
    questions = [
        {
            "question": f"Janet’s ducks lay {n} eggs. She sells 3 for ${n}. How much?",
            "answer": f"She has <<{n}-3={n - 3}>>{n - 3}.\n#### {n - 3}",
        }
        for n in range(10, 30)
    ]
    questions += [{"question": "Long. " * 400, "answer": "#### 1"}] * 3
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    run = tmp_path / "run"
    done = run_command(
        "train.py",
        *base(tiny_models, run),
        f"data.path={data}",
        "rollout.engine=hf",
        "train.steps=2",
        "log.wandb=disabled",
        "data.max_prompt_tokens=200",
        f"eval.path={data}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "3 of 23 prompts are longer than data.max_prompt_tokens=200 and were dropped" in done.stdout
    )
    assert all("reward/accuracy" in row for row in steps(run).values())
    assert "eval/gsm/avg@2" in rows(run)[0]


def test_evaluate_prints_json_last(finished, run_command):
    folder = finished[0] / "checkpoints" / "step_8" / "model"
    done = run_command(
        "-m",
        "scripts.evaluate",
        f"model={folder}",
        "data=stories",
        "k=2",
        "samples=4",
        "size=6",
        "engine=hf",
        "max_new_tokens=12",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads(done.stdout.splitlines()[-1])
    assert {"avg@2", "pass@2", "length_mean", "truncated_frac"} <= scores.keys()
    assert (
        scores["prompts"] == 6
        and scores["samples"] == 4
        and 0 <= scores["avg@2"] <= scores["pass@2"] <= 1
    )


def test_a_prompt_that_comes_eight_times_in_a_step_has_eight_samples(
    tiny_models, run_command, tmp_path
):
    """They had one noise, and so one completion, among them."""
    data, run = tmp_path / "one.jsonl", tmp_path / "run"
    data.write_text('{"prompt": "Mia has 34 shells.", "answer": "34"}\n')
    done = run_command(
        "train.py",
        *base(tiny_models, run),
        f"data.path={data}",
        "rollout.engine=hf",
        "train.steps=1",
        "eval.every=-1",
        "log.wandb=disabled",
        "log.completions=8",
        "checkpoint.every=0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len({tuple(row["tokens"]) for row in rows}) == len(rows) == 8
