"""ProactiveLLM: one forward against one per view, the schedules, and what each term may touch."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from recipes.compose import compose
from recipes.errors import ConfigError
from rollouts.data.examples import Example, Prompt
from rollouts.layout import from_visible
from rollouts.simultaneous.schedules import WEIGHTS, draw_schedule
from trainers.core import attention
from trainers.core.batching import pack
from trainers.core.policy import Policy
from trainers.modes import reading_mode
from trainers.proactivellm import ProactiveLLM
from trainers.run import Run

VOCAB = 64


class Letters:
    """A tokenizer of one token per letter; words are at most three tokens, with the space in the
    first."""

    eos_token_id = 1
    all_special_ids = (1,)

    def __call__(self, texts, add_special_tokens=False):
        one = isinstance(texts, str)
        ids = [
            [2 + ord(letter) % (VOCAB - 2) for letter in text]
            for text in ([texts] if one else texts)
        ]
        return type("Encoding", (), {"input_ids": ids[0] if one else ids})


@pytest.fixture(scope="module")
def policy():
    attention.register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        attn_implementation="packed",
    )
    return Policy(Qwen3ForCausalLM(config).double())


def trainer(**options) -> ProactiveLLM:
    config = compose(
        ["recipe=proactivellm", *(f"proactive.{name}={value}" for name, value in options.items())]
    )
    ProactiveLLM.check(config)
    prompts = [prompt(index) for index in range(4)]
    return ProactiveLLM(
        Run(
            config=config,
            mode=reading_mode(config),
            device=torch.device("cpu"),
            tokenizer=Letters(),
            stop_ids=(1,),
            vocab=VOCAB,
            prompts=prompts,
            sampler=None,
        )
    )


def prompt(index: int) -> Prompt:
    """Frames of 1 or 2 tokens, 1 to 7 units, 1 to 4 words."""
    rng = np.random.default_rng(index)
    lengths = [1 + index % 2, *rng.integers(1, 4, 1 + 2 * index)]
    segments = tuple(tuple(rng.integers(2, VOCAB, n).tolist()) for n in lengths)
    target = " ".join(
        "abcdefghijklmnop"[place : place + 1 + place % 3] for place in range(1 + index)
    )
    return Prompt(
        index,
        tuple(t for s in segments for t in s),
        "",
        Example(index, [], target, target),
        segments,
        ((3, 1)[index % 2 :],),
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_length_of_a_target_is_that_of_one_view(language):
    """Whether an example fits the model's context hangs on it. It was counted as if by words."""
    method = trainer(schedules=2)
    run = method.run
    streaming = replace(run.config.streaming, target_language=language)
    run.config = method.config = replace(run.config, streaming=streaming)
    example = Example(0, [], "a  b", "a  b")
    source = replace(prompt(0), example=example)
    views = 3
    read = method.read(source, step=0)
    assert method.target_length(source, run) * views == int(read.sampled_mask.sum())


def loss_of(policy, method, trajectories) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss in one forward, divided as the loop does, and its gradients."""
    for trajectory in trajectories:
        method.annotate([trajectory])
    batch = pack(trajectories, range(len(trajectories)), torch.device("cpu"))
    policy.zero_grad()
    output = policy(batch, functools.partial(method.loss(), denominator=float(batch.mask.sum())))
    output["loss"].backward()
    return output, {name: p.grad.clone() for name, p in policy.named_parameters()}


def apart(policy, trajectories, options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same written out: a forward for each view, plain log-softmax."""
    policy.zero_grad()
    sums = {"batch": 0.0, "stream": 0.0, "kl": 0.0}
    tokens = 0
    for made in trajectories:
        views = made.layout.views
        length = int((views == 0).sum())
        ids = made.completion_ids[:length]
        learned = torch.from_numpy(made.sampled[:length])
        tokens += int(learned.sum())
        logprobs = []
        for view in range(views.max() + 1):
            visible = made.layout.visible[views == view]  # shifted already
            layout = replace(from_visible(made.layout.source, [0] * length), visible=visible)
            single = replace(made, completion_ids=ids, layout=layout, sampled=None, annotations={})
            batch = pack([single], [0], torch.device("cpu"))
            logprobs.append((policy.hidden(batch) @ policy.head.weight.T).log_softmax(-1)[learned])
        targets = torch.tensor(ids)[learned][:, None]
        batch_view, streams = logprobs[0], logprobs[1:]
        sums["batch"] = sums["batch"] - batch_view.gather(-1, targets).sum()
        for stream in streams:
            sums["stream"] = sums["stream"] - stream.gather(-1, targets).sum() / len(streams)
            top = batch_view.detach().topk(options.top_k).indices if options.top_k < VOCAB else None
            teacher, student = batch_view.detach(), stream
            if top is not None:
                teacher, student = (x.gather(-1, top).log_softmax(-1) for x in (teacher, student))
            sums["kl"] = sums["kl"] + (teacher.exp() * (teacher - student)).sum() / len(streams)
    loss = (
        options.batch_weight * sums["batch"]
        + options.stream_weight * sums["stream"]
        + options.kl_weight * sums["kl"]
    ) / tokens
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedules": 3, "top_k": 7},
        {"batch_weight": 0.3, "stream_weight": 2, "kl_weight": 0.7, "top_k": 5},
        {"batch_weight": 0, "kl_weight": 1.5},
        {"stream_weight": 0, "kl_weight": 1, "schedules": 2},
    ],
)
def test_one_forward_is_one_per_view(policy, options):
    method = trainer(**options)
    drawn = [method.read(p, step=3) for p in method.run.prompts]
    output, grads = loss_of(policy, method, drawn)
    expected, wanted = apart(policy, drawn, method.config.proactive)
    # the weights of the terms are float32
    assert abs(float(output["loss"].detach() - expected.detach())) < 2e-7
    for name in wanted:
        assert (grads[name] - wanted[name]).abs().max() < 2e-7, name


@pytest.mark.parametrize(
    "options, views",
    [
        ({"stream_weight": 0, "kl_weight": 0}, 1),
        ({"kl_weight": 0}, 2),
        ({"batch_weight": 0, "kl_weight": 0, "schedules": 2}, 2),
    ],
)
def test_a_view_without_terms_is_left_out(options, views):
    method = trainer(**options)
    made = method.read(method.run.prompts[2], 0)
    assert made.layout.views.max() + 1 == views
    assert "kl_weights" not in made.annotations


def test_with_all_read_both_views_are_one(policy, monkeypatch):
    monkeypatch.setattr(
        "trainers.proactivellm.draw_schedule", lambda rng, units, words, kind: np.full(words, units)
    )
    method = trainer(kl_weight=1)
    drawn = [method.read(p, 0) for p in method.run.prompts]
    output, _ = loss_of(policy, method, drawn)
    assert output["divergence"].abs().max() < 1e-12
    for made, logprobs in zip(
        drawn,
        np.split(
            output["logprobs"].numpy(), np.cumsum([len(t.completion_ids) for t in drawn])[:-1]
        ),
    ):
        own = made.sampled_mask
        batch, stream = (logprobs[own & (made.layout.views == view)] for view in (0, 1))
        assert len(batch) and np.abs(batch - stream).max() < 1e-12


def test_the_teacher_view_gets_no_gradient(policy):
    """The KL alone: what the batch view's rows carry back into the model is exactly 0."""
    method = trainer(batch_weight=0, stream_weight=0, kl_weight=1)
    drawn = [method.read(p, 1) for p in method.run.prompts]
    method.annotate(drawn)
    batch = pack(drawn, range(len(drawn)), torch.device("cpu"))
    hidden = policy.hidden(batch).detach().requires_grad_()
    loss = method.loss()(policy.head, hidden, batch, denominator=1.0)["loss"]
    loss.backward()
    views = torch.from_numpy(np.concatenate([t.layout.views for t in drawn]))
    assert hidden.grad[views == 0].abs().max() == 0 and hidden.grad[views == 1].abs().max() > 0


def test_views_do_not_see_one_another_and_a_late_unit_no_earlier_word(policy):
    method = trainer()
    made = method.read(method.run.prompts[3], 0)
    base = policy.hidden(pack([made], [0], torch.device("cpu"))).detach()
    views = made.layout.views
    changed = replace(
        made,
        completion_ids=[t if v else (t + 1) % VOCAB for t, v in zip(made.completion_ids, views)],
    )
    moved = (
        (policy.hidden(pack([changed], [0], torch.device("cpu"))) - base).abs().amax(-1).detach()
    )
    rows = np.append(-1, views[:-1])  # hidden state t is of the token before
    assert moved[rows == 1].max() == 0 and moved[rows == 0].min() > 0
    late = replace(made, prompt_ids=[*made.prompt_ids[:-1], (made.prompt_ids[-1] + 1) % VOCAB])
    moved = (
        (policy.hidden(pack([late], [0], torch.device("cpu"))) - base)
        .abs()
        .amax(-1)
        .detach()
        .numpy()
    )
    blind = np.append(0, made.layout.visible[:-1]) < made.layout.source
    assert blind[1:].any() and moved[1:][blind[1:]].max() == 0 and moved[1:][~blind[1:]].min() > 0


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("units, words", [(1, 1), (1, 9), (12, 1), (12, 15), (40, 8)])
def test_schedules_are_monotone_and_end_with_all_read(kind, units, words):
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_schedule(rng, units, words, kind) for _ in range(300)])
    assert drawn.shape == (300, words) and (np.diff(drawn, axis=1) >= 0).all()
    assert drawn.min() >= 1 and (drawn[:, -1] == units).all()


def test_the_weights_shape_the_reading():
    rng = np.random.default_rng(0)
    read = {
        kind: np.stack([draw_schedule(rng, 21, 20, kind) for _ in range(2000)]) for kind in WEIGHTS
    }
    place = np.arange(1, 21)
    for kind, weights in WEIGHTS.items():
        shares = np.cumsum(weights(np.arange(21.0)))[1:] / weights(np.arange(21.0)).sum()
        assert np.abs(read[kind].mean(0) - (1 + 20 * shares)).max() < 0.25
    assert (read["early"].mean(0) >= read["uniform"].mean(0)).all()
    assert (read["late"].mean(0) <= read["uniform"].mean(0) + 0.1).all()
    assert np.abs(read["diagonal"] - (1 + 20 * (place + 1) / 21)).max() <= 1
    assert read["diagonal"].std(0)[9] < read["uniform"].std(0)[9] / 3


def test_schedules_change_with_the_step_and_the_seed_and_nothing_else():
    first, again, later = (trainer().read(prompt(3), step).layout.visible for step in (5, 5, 6))
    assert (first == again).all() and (first != later).any()


@pytest.mark.parametrize(
    "override, said",
    [
        (
            ["streaming.layout=grouped", "rollout.engine=streaming", "proactive.curve=[]"],
            "streaming.layout=grouped",
        ),
        (
            ["proactive.batch_weight=0", "proactive.stream_weight=0", "proactive.kl_weight=0"],
            "all 0",
        ),
        (["train.normalizer=max_length"], "train.normalizer=max_length"),
    ],
)
def test_impossible_settings(override, said):
    with pytest.raises(ConfigError, match=said):
        ProactiveLLM.check(compose(["recipe=proactivellm", *override]))
