"""What an evaluation says of a streaming model: hand-made completions, and the measured speed of a
real engine."""

import time

import pytest
import torch

from recipes.components import VERIFIERS
from recipes.compose import compose
from rollouts.data.examples import Example
from rollouts.layout import arrange
from rollouts.pretrained import token_count
from rollouts.streaming.prompts import streaming_prompts
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Trajectory
from trainers.core.policy import check_model
from trainers.core.rollout import make_engine
from trainers.evaluation import evaluate
from trainers.modes import reading_mode
from trainers.modes.streaming import decoding_speed
from trainers.run import Run

CPU = torch.device("cpu")
EXAMPLE = Example(
    7,
    [{"role": "user", "content": ""}],
    answer="4",
    question="How many apples has Tom?",
    sentences=("Tom has six red apples.", "The sky is blue.", "He gives two of them to Ann."),
)


@pytest.fixture(scope="module")
def tokenizer(streaming_model):
    return check_model("model", str(streaming_model))[0]


def made(layout, tokenizer, *keys):
    sampler = "hf" if layout == "interleaved" else "streaming"
    config = compose(
        [
            "recipe=streaming_sft",
            f"streaming.layout={layout}",
            f"rollout.engine={sampler}",
            "rollout.max_new_tokens=20",
            "streaming.max_thought_tokens=6",
            "streaming.words_per_minute=60",
            *keys,
        ]
    )
    prompts, _ = streaming_prompts([EXAMPLE], tokenizer, config, "data")
    run = Run(
        config=config,
        mode=reading_mode(config),
        tokenizer=tokenizer,
        stop_ids=tokenizer.stop_ids,
        vocab=token_count(tokenizer),
        eval_prompts=prompts,
        verifier=VERIFIERS.resolve("math"),
    )
    return run, run.mode.sampling(tokenizer, tokenizer.stop_ids, max_new_tokens=20)


def completion(config, prompt, tokenizer, thoughts, deep):
    return Trajectory(
        7,
        0,
        finish_reason="stop",
        score=1.0,
        **arrange(config.streaming.layout, prompt.segments, prompt.opening, [*thoughts, deep]),
    )


@pytest.mark.parametrize("layout", ["grouped", "interleaved", "batch"])
def test_by_hand(tokenizer, layout):
    """One word a second, half a second a token; sentences end at 5, 9 and 16 s after the
    question."""
    run, sampling = made(layout, tokenizer, "streaming.seconds_per_token=0.5")
    config, prompts = run.config, run.eval_prompts
    protocol, word = Protocol.of(tokenizer), tokenizer("a").input_ids[0]
    thoughts = [[protocol.skip], [word, protocol.eot], [word] * 5 + [protocol.eot]]
    first = completion(
        config,
        prompts[0],
        tokenizer,
        thoughts,
        [word, word, protocol.eor, word, word, protocol.eoa],
    )
    other = completion(
        config, prompts[0], tokenizer, [[protocol.skip]] * 3, [word] * 3 + [protocol.eoa]
    )
    found = run.mode.metrics(run, [first, other], sampling)
    lengths = [len(segment) for segment in prompts[0].segments]
    if layout == "batch":
        waits, latencies = [sum(lengths)] * 2, [(9 + 4) / 2, (3 + 4) / 2]
    # a token after the second sentence for the first one; all for the other, which only skips
    else:
        waits, latencies = [sum(lengths[:4]), sum(lengths)], [(6 + 4) / 2, (1 + 4) / 2]
    assert found == pytest.approx(
        {
            "streaming_length_mean": (9 + 3) / 2,
            "deep_length_mean": (6 + 4) / 2,
            "skip_frac": 4 / 6,
            "wait_tokens": sum(waits) / 2,
            "latency_s": sum(latencies) / 2,
            "seconds_per_token": 0.5,
        }
    )


@pytest.mark.parametrize("layout", ["grouped", "interleaved"])
def test_the_speed_is_measured_once(tokenizer, streaming_model, layout, tmp_path):
    run, sampling = made(layout, tokenizer, f"model.path={streaming_model}", "eval.k=2")
    run.rollout = run.mode.wrap(make_engine(run.config, CPU, torch.float32, 256))
    started = time.perf_counter()
    scores, trajectories = evaluate(run)
    speed = scores["seconds_per_token"]
    assert 1e-5 < speed < (time.perf_counter() - started) / 32
    assert run.mode.seconds_per_token == speed and run.config.streaming.seconds_per_token is None
    again, _ = evaluate(run)
    assert again == scores and len(trajectories) == 2
    assert decoding_speed(run.rollout, run.eval_prompts[0], sampling) != speed
    # A resumed run takes it from the records of its first process.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval//seconds_per_token": 0.25}\n')
    run.mode.seconds_per_token, run.directory, run.start = None, tmp_path, 3
    assert evaluate(run)[0]["seconds_per_token"] == 0.25


def test_the_record_shows_the_protocol_and_the_verifier_sees_the_deep_segment_alone(tokenizer):
    run, _ = made("grouped", tokenizer)
    config, prompts = run.config, run.eval_prompts
    protocol = Protocol.of(tokenizer)

    def box(n):
        return tokenizer(f"\\boxed{{{n}}}", add_special_tokens=False).input_ids

    thoughts = [[*box(9), protocol.eot], [protocol.skip], [*box(8), protocol.eot]]
    drawn = completion(
        config,
        prompts[0],
        tokenizer,
        thoughts,
        [
            *tokenizer("6 - 2", add_special_tokens=False).input_ids,
            protocol.eor,
            *box(4),
            protocol.eoa,
        ],
    )
    judged, verify = [], VERIFIERS.resolve("math")
    run.verifier = lambda text, answer: judged.append(text) or verify(text, answer)
    run.mode.score_all(run, prompts, [drawn])
    assert drawn.completion.endswith(
        "<SEP><EOQ>\\boxed{9}<EOT><skip>\\boxed{8}<EOT>6 - 2<EOR>\\boxed{4}"
    )
    assert drawn.prompt.endswith("<EOS>He gives two of them to Ann.<EOS>")
    assert judged == ["6 - 2<EOR>\\boxed{4}"] and drawn.score == 1.0
