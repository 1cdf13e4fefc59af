"""Sources of frames through a tiny causal encoder: read by the second, trained and decoded as text
is."""

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from recipes.components import DECISION_HEADS
from recipes.compose import compose
from recipes.errors import ConfigError, DataError, ModelError
from rollouts.data.load import load_examples
from rollouts.layout import additive
from rollouts.simultaneous.decision import SimultaneousSampling, word_starts
from rollouts.simultaneous.engine import SimultaneousEngine
from rollouts.simultaneous.frames import FRAME, check_causal, embed, load_encoder
from rollouts.simultaneous.prompts import unit_prompts
from rollouts.trajectory import Request
from scripts.tiny_models import TinyModel, initialise
from trainers.core.batching import pack
from trainers.core.policy import load_policy
from trainers.modes import reading_mode
from trainers.proactivellm import ProactiveLLM
from trainers.run import Run

CPU = torch.device("cpu")
WIDTH, HIDDEN = 5, 64


class TinyEncoder(nn.Module):
    """Two frames per embedding, 20 frames per second; an embedding mixes its stride with the one
    before."""

    width, stride, rate, causal = WIDTH, 2, 20.0, True

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.project = nn.Linear(2 * WIDTH, HIDDEN)

    def forward(self, frames):
        padded = nn.functional.pad(frames, (0, 0, 0, len(frames) % 2))
        made = self.project(padded.reshape(-1, 2 * WIDTH))
        other = torch.roll(made, 1 if self.causal else -1, 0)
        if self.causal:
            other = torch.cat([torch.zeros_like(made[:1]), made[:-1]])
        return 0.05 * (made + other)


class Looking(TinyEncoder):
    causal = False


ENCODER = f"{__name__}.TinyEncoder"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Data of seven sources of 3 to 24 frames, a model, and their config."""
    folder = tmp_path_factory.mktemp("frames")
    initialise(
        folder / "model",
        TinyModel(
            end="<|endoftext|>", steps=0, seed=0, hidden=HIDDEN, layers=2, recipe="proactivellm"
        ),
    )
    rng = np.random.default_rng(0)
    rows = []
    for index in range(7):
        frames = rng.normal(size=(3 + 3 * index + index // 2, WIDTH)).astype(np.float32)
        if index % 2:
            np.save(folder / f"{index}.npy", frames)
        rows.append(
            {
                "audio": f"{index}.npy" if index % 2 else frames.tolist(),
                "text": "rarin lalun laxan"[: 5 + 6 * (index % 3)],
            }
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(
        [
            "recipe=proactivellm",
            f"model.path={folder / 'model'}",
            f"data.path={folder / 'data.jsonl'}",
            f"model.encoder={ENCODER}",
            "data.prompt_column=audio",
            "data.target_column=text",
            "streaming.unit_seconds=0.4",
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = load_examples(
        str(folder / "data.jsonl"), prompt_column="audio", target_column="text"
    )
    return config, tokenizer, examples, unit_prompts(examples, tokenizer, config, "data")[0]


def test_units_are_read_by_the_second(setting):
    _config, tokenizer, examples, prompts = setting
    for example, prompt in zip(examples, prompts):
        count = -(-len(example.frames) // 2)
        units = [sum(token == FRAME for token in segment) for segment in prompt.segments]
        assert units[0] == 0 and sum(units) == count
        # 0.4 s of 10 embeddings per second
        assert all(n == 4 for n in units[1:-1]) and 1 <= units[-1] <= 4
        assert prompt.segments[-1][-1] == tokenizer.eos_token_id


def test_the_sampler_agrees_with_the_masked_forward(setting):
    config, tokenizer, _examples, prompts = setting
    engine = SimultaneousEngine(config.model.path, config, CPU, torch.float32)
    requests = [
        Request(p.index, 0, p.token_ids, p.index, p.segments, p.opening, p.example.frames)
        for p in prompts
    ]
    sampling = SimultaneousSampling(
        max_new_tokens=10,
        stop_ids=(tokenizer.eos_token_id,),
        head=DECISION_HEADS.resolve("entropy")(6.2),
        word_starts=word_starts(tokenizer),
    )
    made = engine.generate(requests, sampling)
    assert len({tuple(t.reads) for t in made}) > 2
    for trajectory in made:
        ids = torch.tensor([trajectory.token_ids])
        hidden = engine.model.base_model(
            inputs_embeds=embed(engine.model, engine.encoder, ids, [trajectory.frames]),
            position_ids=torch.from_numpy(trajectory.layout.positions())[None],
            use_cache=False,
            attention_mask=additive(torch.from_numpy(trajectory.layout.mask()), torch.float32)[
                None, None
            ],
        ).last_hidden_state[0, len(trajectory.prompt_ids) - 1 : -1]
        exact = (
            engine.model.lm_head(hidden)
            .log_softmax(-1)
            .gather(-1, torch.tensor(trajectory.completion_ids)[:, None])[:, 0]
            .detach()
            .numpy()
        )
        own = trajectory.sampled_mask
        assert np.abs(exact - trajectory.logprobs)[own].max() < 1e-5


def test_what_is_heard_later_changes_no_earlier_word(setting):
    config, tokenizer, _examples, prompts = setting
    policy = load_policy(
        config.model.path,
        torch.float32,
        CPU,
        masked=True,
        embed=reading_mode(config).embedder(CPU),
    )
    method = ProactiveLLM(
        Run(
            config=config,
            mode=reading_mode(config),
            device=CPU,
            tokenizer=tokenizer,
            stop_ids=(tokenizer.eos_token_id,),
            vocab=len(tokenizer),
            prompts=prompts,
            sampler=None,
        )
    )
    made = method.read(prompts[5], 2)
    base = policy.hidden(pack([made], [0], CPU))
    made.frames = made.frames.copy()
    made.frames[-1] += 5
    moved = (policy.hidden(pack([made], [0], CPU)) - base).abs().amax(-1).detach().numpy()[1:]
    ends = np.cumsum([len(s) for s in prompts[5].segments])
    blind = made.layout.visible[:-1] <= ends[-2]
    assert blind.any() and moved[blind].max() == 0 and moved[~blind].min() > 0


def test_a_step_of_frames_in_one_batch_is_that_of_each_alone(setting):
    config, tokenizer, _examples, prompts = setting
    policy = load_policy(
        config.model.path, torch.float32, CPU, masked=True, embed=reading_mode(config).embedder(CPU)
    ).double()
    method = ProactiveLLM(
        Run(
            config=config,
            mode=reading_mode(config),
            device=CPU,
            tokenizer=tokenizer,
            stop_ids=(tokenizer.eos_token_id,),
            vocab=len(tokenizer),
            prompts=prompts,
            sampler=None,
        )
    )
    drawn = [method.read(p, 0) for p in prompts]
    method.annotate(drawn)
    loss = functools.partial(method.loss(), denominator=50.0)
    together = float(policy(pack(drawn, range(7), CPU), loss)["loss"].detach())
    alone = sum(float(policy(pack(drawn, [i], CPU), loss)["loss"].detach()) for i in range(7))
    assert together == pytest.approx(alone, rel=1e-9)
    # it is not trained
    assert not any(name.startswith("encode") for name, _ in policy.named_parameters())


def test_an_encoder_that_looks_ahead():
    with pytest.raises(ModelError, match="not causal"):
        check_causal(Looking(), CPU)


@pytest.mark.parametrize(
    "cell, said",
    [
        ([[1.0, 2.0]], "frames of 2 numbers; model.encoder reads 5"),
        ([[1.0], [1.0, 2.0]], "cannot be read"),
        ("missing.npy", "cannot be read"),
    ],
)
def test_bad_frames(setting, tmp_path, cell, said):
    config, tokenizer, _, _ = setting
    (tmp_path / "data.jsonl").write_text(json.dumps({"audio": cell, "text": "rarin"}))
    with pytest.raises(DataError, match=said):
        unit_prompts(
            load_examples(
                str(tmp_path / "data.jsonl"), prompt_column="audio", target_column="text"
            ),
            tokenizer,
            config,
            "data",
        )


def test_frames_without_an_encoder(setting):
    _config, tokenizer, examples, _ = setting
    with pytest.raises(ConfigError, match=r"model\.encoder"):
        unit_prompts(examples, tokenizer, compose(["recipe=proactivellm"]), "data")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_encoder("nowhere.Encoder")
