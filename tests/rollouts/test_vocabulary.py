"""Heads with more rows than the tokenizer has tokens, and tokenizers with holes in their ids."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kernels
from recipes.compose import compose
from rollouts.engines.huggingface import HuggingFaceEngine
from rollouts.engines.vllm import VllmEngine
from rollouts.pretrained import token_count
from rollouts.streaming.tokens import add_tokens, extend_model
from rollouts.trajectory import Request, Sampling
from scripts.tiny_models import TinyModel, initialise
from trainers.core.policy import load_policy
from trainers.core.scoring import head_options

ROWS = 1024


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A student and a teacher of random weights, half of whose rows no token has."""
    folder = tmp_path_factory.mktemp("padded")
    for name, end, seed in (("student", "<|endoftext|>", 1), ("teacher", "<|im_end|>", 2)):
        initialise(
            folder / name,
            TinyModel(end=end, steps=0, seed=seed, hidden=64, layers=2, vocab_size=ROWS),
        )
    return folder


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def engine(request, padded):
    kind = {"hf": HuggingFaceEngine, "vllm": VllmEngine}[request.param]
    engine = kind(
        str(padded / "student"), compose([]), torch.device("cpu"), torch.float32, max_length=64
    )
    yield engine
    engine.close()


def requests(count: int) -> list[Request]:
    return [Request(0, index, (5, 6, 7), index) for index in range(count)]


def read(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def largest(trajectories) -> int:
    return max(token for trajectory in trajectories for token in trajectory.completion_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_only_tokens_of_the_tokenizer_are_drawn(engine, padded, temperature):
    vocab = token_count(AutoTokenizer.from_pretrained(padded / "student"))
    assert vocab < ROWS
    sampling = Sampling(12, temperature=temperature, vocab=vocab)
    assert largest(engine.generate(requests(40), sampling)) < vocab
    if temperature:
        assert largest(engine.generate(requests(40), Sampling(12))) >= vocab


@pytest.mark.parametrize("missing", [(), tuple(range(8, 400))])
def test_log_probs_are_over_the_tokens_alone(engine, padded, missing):
    vocab = token_count(AutoTokenizer.from_pretrained(padded / "student"))
    model = AutoModelForCausalLM.from_pretrained(padded / "student", dtype=torch.float32)
    (one,) = engine.generate(requests(1), Sampling(12, vocab=vocab, missing=missing))
    assert not set(one.completion_ids) & set(missing)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, *one.completion_ids]])).logits[0, 2:-1, :vocab]
    logits[:, list(missing)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(one.logprobs), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["hf", "vllm"])
def test_a_run_with_padded_heads(padded, overrides, run_command, tmp_path, sampler):
    """It died in the kernels at the first id that the tokenizer does not have."""
    done = run_command(
        "train.py",
        *overrides(
            model__path=padded / "student",
            teacher__path=padded / "teacher",
            rollout__engine=sampler,
        ),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    gaps = [row["mismatch/logp_abs_mean"] for row in rows if "train/loss" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-5


@pytest.mark.slow
def test_a_streaming_run_with_a_padded_head(padded, overrides, run_command, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(padded / "student")
    model = extend_model(
        str(padded / "student"), tokenizer, add_tokens(tokenizer), tmp_path / "streaming"
    )
    assert token_count(tokenizer) < ROWS
    keys = {"rollout__samples_per_prompt": 2, "streaming__seconds_per_token": 0.01}
    done = run_command("train.py", *overrides(recipe="adasr", model__path=model, **keys))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert max(row.get("mismatch/logp_abs_mean", 0) for row in rows) < 1e-5
    # An id without a token is written as nothing.
    written = [row["tokens"] for row in read(tmp_path / "run" / "completions.jsonl")]
    assert written and all(token for tokens in written for token in tokens)


def test_the_head_leaves_out_what_is_no_token(padded):
    """The trainer's distribution is the sampler's."""
    missing = (3, 700)
    policy = load_policy(
        str(padded / "student"), torch.float32, torch.device("cpu"), missing=missing
    )
    hidden, head = torch.randn(5, 64), policy.head
    targets = torch.arange(ROWS).repeat(5, 1)
    options = head_options(head, 1.0, ROWS)
    logprobs = kernels.fused_linear_logprobs(hidden, head.weight, targets, **options).logprobs
    expected = torch.nn.functional.linear(hidden, head.weight)
    expected[:, list(missing)] = -torch.inf
    assert float(logprobs.detach()[:, list(missing)].exp().max()) == 0
    kept = [id for id in range(ROWS) if id not in missing]
    torch.testing.assert_close(logprobs[:, kept], expected.log_softmax(-1)[:, kept])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["poweropd", "poweropd_full"])
def test_a_tokenizer_with_holes(padded, overrides, run_command, tmp_path, recipe):
    """Its end token has an id above its number of tokens, and 400 ids below it have no token."""
    for name in ("student", "teacher"):
        folder = shutil.copytree(padded / name, tmp_path / name)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        end = {"student": "<|endoftext|>", "teacher": "<|im_end|>"}[name]
        ids = {"<|endoftext|>": 900, "<|im_end|>": 901}
        for token in content["added_tokens"]:
            token["id"] = ids.get(token["content"], token["id"])
        content["model"]["vocab"] |= ids
        file.write_text(json.dumps(content))
        for config in ("config.json", "generation_config.json"):
            values = json.loads((folder / config).read_text())
            values["eos_token_id"] = ids[end]
            (folder / config).write_text(json.dumps(values))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.eos_token_id == 900 > len(tokenizer) and token_count(tokenizer) == 902
    done = run_command(
        "train.py",
        *overrides(
            model__path=tmp_path / "student",
            teacher__path=tmp_path / "teacher",
            rollout__engine="hf",
            recipe=recipe,
        ),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert max(row.get("mismatch/logp_abs_mean", 0) for row in rows) < 1e-5
    assert all(row["train/loss"] is not None for row in rows if "train/loss" in row)
    written = "".join(row["completion"] for row in read(tmp_path / "run" / "completions.jsonl"))
    # transformers writes an id without a token as nothing, or as null.
    tokens = [t for row in read(tmp_path / "run" / "completions.jsonl") for t in row["tokens"]]
    assert written and all(tokens)
