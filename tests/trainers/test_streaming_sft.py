"""Streaming SFT: what is learned under each layout, a model that lacks the tokens, bad data, and a
whole run."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rollouts.data.marks import TOKENS
from rollouts.layout import grouped
from rollouts.streaming.prompts import target_segments
from rollouts.streaming.tokens import Protocol
from trainers.modes import reading_mode
from trainers.prepare import prepare
from trainers.run import Run
from trainers.streaming_sft import StreamingSFT

COT = {
    "Instruct_Context": {
        "context": "Ann has 3 pens.<EOS> She buys 4.<EOS>",
        "instruct": "How many?",
    },
    "streaming_reasoning": "So.<EOQ>\nStart: 3.<EOT>\n3 + 4 = 7.<EOT>",
    "deep_reasoning": "It is 7. <EOR> Therefore, the answer is \\box{7}.<EOA>\n",
    "answer": "\\boxed{7}",
}


@pytest.fixture
def data(tmp_path):
    def write(*rows):
        (tmp_path / "cot.json").write_text(json.dumps(rows))
        return tmp_path / "cot.json"

    return write


def drawn(overrides, **changed):
    config = compose(
        overrides(recipe="streaming_sft", eval__every=-1, train__prompts_per_step=1, **changed)
    )
    made = prepare(config)
    parts = Run(
        config=config,
        mode=reading_mode(config),
        device=torch.device("cpu"),
        tokenizer=made.tokenizer,
        stop_ids=made.stop_ids,
        vocab=made.vocab,
        prompts=made.prompts,
        sampler=made.sampler,
    )
    trainer = StreamingSFT(parts)
    trajectories = trainer.draw(0)
    trainer.annotate(trajectories)
    return made, trajectories[0]


@pytest.mark.parametrize("layout", ["grouped", "batch", "interleaved"])
def test_what_is_read_and_what_is_learned(overrides, streaming_model, data, layout):
    engine = "hf" if layout == "interleaved" else "streaming"
    made, t = drawn(
        overrides,
        model__path=streaming_model,
        data__path=data(COT),
        streaming__layout=layout,
        rollout__engine=engine,
        streaming__target_offset=0 if layout == "interleaved" else 5,
    )
    prompt, tokenizer = made.prompts[0], made.tokenizer
    written = target_segments(prompt.example, tokenizer)
    ids, mask = np.array(t.completion_ids), t.annotations["mask"]
    # every thought and the deep segment
    assert ids[mask].tolist() == [token for part in written for token in part]
    assert t.slots[mask].tolist() == [k for k, part in enumerate(written) for _ in part]
    assert (t.annotations["ce_weights"] == 1).all()
    assert sorted(t.token_ids) == sorted(
        [*prompt.token_ids, *sum(prompt.opening, ()), *sum(written, ())]
    )
    assert t.answer == "7" and t.completion == tokenizer.decode(ids[mask])
    if layout == "interleaved":
        assert t.layout is None
        eos = [i for i, token in enumerate(t.token_ids) if token == Protocol.of(tokenizer).eos]
        assert eos[0] == len(t.prompt_ids) - 1 and not mask[eos[1] - len(t.prompt_ids)]
    else:
        assert t.prompt_ids == list(prompt.token_ids)
        lengths = [len(part) for part in (*prompt.opening, *written)]
        expected = grouped([len(s) for s in prompt.segments], lengths, 5).visible
        assert t.layout.visible.tolist() == (
            expected.tolist() if layout == "grouped" else [t.layout.source] * len(ids)
        )
        assert t.layout.offset == 5


def test_a_model_without_the_tokens_gets_them(overrides, tiny_models, data):
    made, t = drawn(overrides, data__path=data(COT))
    size = AutoModelForCausalLM.from_pretrained(tiny_models["student"]).config.vocab_size
    assert made.new_tokens == list(TOKENS) and made.vocab == size + 7
    assert any("gets 7 tokens it lacks: <SEP> <EOQ>" in note for note in made.messages)
    assert max(t.token_ids) < size + 7


@pytest.mark.parametrize(
    "row, said",
    [
        (COT | {"streaming_reasoning": "a<EOT>b<EOT>c<EOT>"}, "has 3 thoughts for 2 sentences"),
        ({"question": "no sentence ends in here", "answer": "1"}, "no sentence end was found"),
        (
            COT
            | {"Instruct_Context": {"context": "Ann has 3.<EOS> <EOS>", "instruct": "How many?"}},
            "sentence 2 is empty",
        ),
        (
            COT
            | {
                "Instruct_Context": {
                    "context": "word " * 600 + "<EOS>b<EOS>",
                    "instruct": "How many?",
                }
            },
            "all 1 sources are longer than 512 tokens",
        ),
    ],
)
def test_bad_data_is_one_line_before_a_model_loads(overrides, data, row, said):
    with pytest.raises(DataError) as caught:
        prepare(compose(overrides(recipe="streaming_sft", data__path=data(row), eval__every=-1)))
    assert (
        said in str(caught.value)
        and "cot.json" in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_source_longer_than_the_context(overrides, data):
    long = COT | {
        "Instruct_Context": {"context": "word " * 2100 + "<EOS>b<EOS>", "instruct": "How many?"}
    }
    with pytest.raises(
        DataError, match="all 1 examples are longer than the model's context of 2048 tokens"
    ):
        prepare(
            compose(
                overrides(
                    recipe="streaming_sft",
                    data__path=data(long),
                    eval__every=-1,
                    data__max_prompt_tokens=100000,
                )
            )
        )


def test_a_layout_is_needed(overrides):
    with pytest.raises(ConfigError, match="streaming.layout=null: recipe=streaming_sft needs"):
        prepare(
            compose(
                overrides(recipe="streaming_sft", streaming__layout="null", rollout__engine="hf")
            )
        )


def test_a_whole_run_from_a_model_without_the_tokens(overrides, run_command, tmp_path, tiny_models):
    arguments = overrides(
        recipe="streaming_sft", train__steps=4, train__warmup_steps=0, eval__k=1, data__stories=16
    )
    done = run_command("train.py", *arguments, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert (
        len(losses) == 4
        and losses[-1] < losses[0]
        and any("eval/stories/avg@1" in row for row in rows)
    )
    saved = tmp_path / "run" / "checkpoints" / "step_4" / "model"
    assert (
        Protocol.of(AutoTokenizer.from_pretrained(saved))
        and (tmp_path / "run" / "start" / "config.json").is_file()
    )
    assert (
        AutoModelForCausalLM.from_pretrained(saved).lm_head.weight.shape[0]
        == max(Protocol.of(AutoTokenizer.from_pretrained(saved)).ids) + 1
    )
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").model.path == str(
        tiny_models["student"]
    )
