"""Streaming layouts in the trainer: packed rows against separate forwards, every attention,
gradients, the canary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from recipes.compose import compose
from recipes.errors import ConfigError, ModelError
from rollouts.data.examples import Example, Prompt, PromptSampler
from rollouts.layout import Layout, from_visible, grouped
from rollouts.layout import batch as read_first
from rollouts.streaming.engine import StreamingEngine
from rollouts.streaming.tokens import Protocol, add_tokens, extend_model
from rollouts.trajectory import Trajectory
from trainers.core import attention
from trainers.core.batching import empty_like, pack, unpack
from trainers.core.policy import load_policy
from trainers.core.scoring import score_tokens
from trainers.evaluation import evaluate
from trainers.grpo import GRPO
from trainers.modes import reading_mode
from trainers.prepare import max_length
from trainers.run import Run

CPU = torch.device("cpu")


def trajectories() -> list[Trajectory]:
    """Two grouped ones, a plain one, two views, and one that was read first."""
    rng = np.random.default_rng(0)
    layouts = [
        grouped([3, 4, 2], [2, 3, 5, 1], offset=4),
        grouped([9], [1, 4]),
        Layout(17),
        from_visible(6, [6] * 5 + [1, 2, 2, 4, 6], views=[0] * 5 + [1] * 5),
        read_first(5, 8),
    ]
    made = []
    for index, layout in enumerate(layouts):
        ids = rng.integers(3, 400, layout.length).tolist()
        plain = not len(layout.visible)
        source = 8 if plain else layout.source
        made.append(
            Trajectory(
                index, 0, ids[:source], ids[source:], "stop", layout=None if plain else layout
            )
        )
        made[-1].annotations["mask"] = made[-1].sampled_mask
    return made


def separate(model, trajectory) -> torch.Tensor:
    """The hidden states that predict the completion, of one unpacked forward with a dense mask."""
    layout = trajectory.layout or Layout(trajectory.length)
    mask = torch.where(torch.from_numpy(layout.mask()), 0.0, -torch.inf)
    states = model.base_model(
        torch.tensor([trajectory.token_ids]),
        attention_mask=mask[None, None],
        position_ids=torch.from_numpy(layout.positions())[None],
    ).last_hidden_state[0]
    return states[len(trajectory.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("implementation", ["packed", "sdpa", "eager", "flex_attention"])
def test_packed_layouts_equal_separate_forwards(tiny_models, implementation):
    path = str(tiny_models["student"])
    # Compiled for a CPU, torch 2.13's flex_attention takes a minute, and its code for a second
    # length is not valid C++.
    with torch.compiler.set_stance("force_eager"):
        policy = load_policy(path, torch.float32, CPU, implementation, masked=True).eval()
        alone, made = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
            trajectories(),
        )
        for members in ([0, 1, 2, 3, 4], [4, 2, 0], [2], [3]):
            batch = pack(made, members, CPU)
            assert (batch.layouts is None) == (members == [2])
            with torch.no_grad():
                found, expected = (
                    policy.hidden(batch),
                    torch.cat([separate(alone, made[m]) for m in members]),
                )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_block_mask_skips_what_nothing_sees():
    layouts = [grouped([200, 200, 100], [150, 150]), Layout(300), read_first(256, 128)]
    bounds = np.cumsum([0] + [layout.length for layout in layouts]).tolist()
    found = attention.arguments("flex_attention", bounds, layouts, torch.zeros(1))["attention_mask"]
    dense = torch.zeros(-(-bounds[-1] // 128) * 128, -(-bounds[-1] // 128) * 128, dtype=torch.bool)
    for start, end, layout in zip(bounds, bounds[1:], layouts):
        dense[start:end, start:end] = torch.from_numpy(layout.mask())
    blocks = dense.view(dense.shape[0] // 128, 128, -1, 128).any(3).any(1)
    torch.testing.assert_close(found.to_dense()[0, 0].bool(), blocks)
    assert 0 < blocks.float().mean() < 0.5


@pytest.mark.parametrize("implementation", ["packed", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_packed_row_are_those_of_separate_forwards(
    tiny_models, implementation, checkpointing
):
    path, made = str(tiny_models["student"]), trajectories()
    policy = load_policy(path, torch.float32, CPU, implementation, masked=True)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    batch = pack(made, range(len(made)), CPU)
    weights = torch.randn(len(batch.targets), 64, generator=torch.Generator().manual_seed(0))
    (policy.hidden(batch) * weights).sum().backward()
    alone = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (torch.cat([separate(alone, t) for t in made]) * weights).sum().backward()
    expected = dict(alone.named_parameters())
    for name, parameter in policy.model.named_parameters():
        largest = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5 * largest, rtol=0)


def test_plain_rows_keep_their_path(tiny_models):
    made = trajectories()
    batch = pack(made, [2, 2], CPU)
    weight = torch.zeros(1)
    row = attention.arguments("packed", batch.bounds, batch.layouts, weight)["packed_row"]
    assert row.bounds == [0, 17, 34] and row.masks == [None, None]
    assert attention.arguments("sdpa", batch.bounds, batch.layouts, weight) == {}
    mixed = pack(made, [0, 2], CPU)
    masks = attention.arguments("packed", mixed.bounds, mixed.layouts, weight)["packed_row"].masks
    assert masks[0].shape == (20, 20) and masks[1] is None  # its own length, never the row's
    assert empty_like(mixed).layouts is mixed.layouts


def blind(module, query, key, value, attention_mask, **kwargs):
    """Attention that takes a mask and does not look at it, as kernels without masks do."""
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


def refuses_masks(module, query, key, value, attention_mask, **kwargs):
    if attention_mask is not None:
        raise ValueError("masks are not taken here")
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


@pytest.mark.parametrize(
    "function, said",
    [
        (
            blind,
            "Qwen3ForCausalLM does not keep to a streaming mask with attention unmasked; try "
            "model.attn_impl",
        ),
        (
            refuses_masks,
            "Qwen3ForCausalLM fails under a streaming mask with attention unmasked: masks are "
            "not taken here",
        ),
    ],
)
def test_attention_that_ignores_masks_is_refused_at_start(tiny_models, function, said):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    AttentionInterface.register("unmasked", function)
    ALL_MASK_ATTENTION_FUNCTIONS.register("unmasked", sdpa_mask)
    policy = load_policy(str(tiny_models["student"]), torch.float32, CPU)
    policy.model.config._attn_implementation = "unmasked"  # loading refuses names it cannot check
    with pytest.raises(ModelError) as caught:
        policy.check_layouts()
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def streaming(tiny_models, tmp_path_factory):
    """A tiny model with the protocol tokens, and prompts of two to four sentences for it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    folder = extend_model(
        str(tiny_models["student"]),
        tokenizer,
        add_tokens(tokenizer),
        tmp_path_factory.mktemp("streaming") / "model",
    )
    marks, prompts = Protocol.of(tokenizer), []
    for index in range(4):
        texts = ["Mia has 3 pens.", "She finds 2 more.", "Then it rains."] * 2
        sentences = [(*tokenizer(text).input_ids, marks.eos) for text in texts[: 2 + index % 3]]
        segments = ((marks.sep,), (*tokenizer("How many pens?").input_ids, marks.eoq), *sentences)
        prompts.append(
            Prompt(
                index,
                tuple(i for part in segments for i in part),
                "",
                Example(index, [], answer="5"),
                segments,
                ((marks.sep,), (marks.eoq,)),
            )
        )
    return folder, tokenizer, prompts


@pytest.mark.parametrize("minibatches", [1, 2])
def test_old_log_probs_under_the_layout_are_the_samplers(streaming, minibatches):
    folder, tokenizer, prompts = streaming
    config = compose(
        [
            "recipe=grpo",
            "trainer=trainers.grpo.GRPO",  # by its path it reads the keys of every method
            "streaming.layout=grouped",
            "rollout.engine=streaming",
            f"model.path={folder}",
            "streaming.max_thought_tokens=6",
            "rollout.max_new_tokens=8",
            "rollout.samples_per_prompt=2",
            "train.prompts_per_step=4",
            f"train.minibatches={minibatches}",
            "grpo.kl_beta=0",
            "eval.k=1",
        ]
    )
    policy = load_policy(
        str(folder), torch.float32, CPU, config.model.attn_implementation, masked=True
    )

    def score(drawn):
        batch = pack(drawn, range(len(drawn)), CPU)
        with torch.no_grad():
            hidden = policy.hidden(batch)
        scored = score_tokens(
            policy.head, hidden, targets=batch.targets, temperature=1.0, vocab=len(tokenizer)
        )
        for trajectory, own in zip(drawn, unpack(batch, drawn, scored.logprobs)):
            trajectory.annotations["student_logprobs"] = own

    engine = StreamingEngine(str(folder), config, CPU, torch.float32)
    seen = []

    def verifier(text, answer):
        seen.append(text)
        return float(len(text) % 2)

    method = GRPO(
        Run(
            config=config,
            mode=reading_mode(config),
            device=CPU,
            tokenizer=tokenizer,
            stop_ids=(tokenizer.eos_token_id,),
            vocab=len(tokenizer),
            prompts=prompts,
            sampler=PromptSampler(4, 4, 0),
            verifier=verifier,
            rollout=engine,
            score_policy=score,
        )
    )
    drawn = method.draw(0)
    method.annotate(drawn)
    marks = Protocol.of(tokenizer)
    for trajectory, judged in zip(drawn, seen):
        notes, slots = trajectory.annotations, trajectory.slots
        np.testing.assert_array_equal(notes["mask"], trajectory.sampled)
        assert not notes["mask"][:2].any() and slots.max() == 2 + trajectory.prompt_index % 3
        assert trajectory.layout.offset == 0 and trajectory.completion_ids[:2] == [
            marks.sep,
            marks.eoq,
        ]
        deep = np.array(trajectory.completion_ids)[slots == slots.max()]
        assert judged == tokenizer.decode(deep[:-1] if trajectory.finish_reason == "stop" else deep)
        if minibatches > 1:
            assert np.abs(notes["old_logprobs"] - trajectory.logprobs)[notes["mask"]].max() < 1e-5
    method.run.eval_prompts = prompts
    scores, own = evaluate(method.run)
    assert scores["length_mean"] == np.mean([t.sampled.sum() for t in own])
    assert {len(t.completion_ids) for t in own} != {t.sampled.sum() for t in own}


def test_lengths_count_openings_and_thoughts(streaming):
    _, _, prompts = streaming
    config = compose(
        ["recipe=streaming_sft", "rollout.max_new_tokens=80", "streaming.max_thought_tokens=6"]
    )
    longest = max(prompts, key=lambda p: len(p.token_ids))
    source, written = len(longest.token_ids), 2 + 4 * 6 + config.rollout.max_new_tokens
    run = Run(config=config, mode=reading_mode(config), prompts=prompts)
    assert max_length(run, source + written) == source + written
    # positions restart
    assert max_length(run, max(source, written)) == source + written
    with pytest.raises(
        ConfigError, match="sources and thoughts of up to .* exceeds the model's context"
    ):
        max_length(run, max(source, written) - 1)
    apart = compose(
        [
            "recipe=streaming_sft",
            "streaming.layout=interleaved",
            "rollout.engine=hf",
            "rollout.max_new_tokens=80",
            "streaming.max_thought_tokens=6",
        ]
    )
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        run = Run(config=apart, mode=reading_mode(apart), prompts=prompts)
        max_length(run, source + written - 1)


def test_only_the_deep_segment_is_judged():
    words = {1: "Five", 2: ".", 3: "Six"}
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(words[i] for i in ids))
    prompt = Prompt(0, (9,), "", Example(0, [], answer="Six"))
    trajectory = Trajectory(0, 0, [9], [1, 2, 3, 2], "stop", slots=np.array([0, 0, 1, 1]))
    mode = reading_mode(compose(["recipe=streaming_sft"]))
    run = SimpleNamespace(tokenizer=tokenizer, verifier=lambda text, answer: text == answer)
    mode.score_all(run, [prompt], [trajectory])
    assert trajectory.score == 1 and trajectory.completion == "Five . Six"
