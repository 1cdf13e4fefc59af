"""The rewards of a streaming completion, worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from rewards.streaming import score_stages
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Trajectory

OPTIONS = SimpleNamespace(format_weight=0.2, streaming_weight=0.3, deep_weight=0.5, deep_credit=0.8)


@pytest.fixture(scope="module")
def tokenizer(streaming_model):
    return AutoTokenizer.from_pretrained(streaming_model)


@pytest.fixture
def stages(tokenizer):
    def make(slots, deep, score=1.0, finish="stop", forced=()):
        """`slots` and `deep` are texts with their marks; the opening is <SEP> <EOQ>."""
        parts = [tokenizer(text).input_ids for text in ("<SEP><EOQ>", *slots, deep)]
        ids = [token for part in parts for token in part]
        numbers = np.repeat(np.arange(-1, len(parts) - 1), [len(p) for p in parts])
        sampled = numbers >= 0
        for slot in forced:
            sampled[np.flatnonzero(numbers == slot)[-1]] = False
        trajectory = Trajectory(0, 0, [1], ids, finish, score=score, sampled=sampled, slots=numbers)
        return score_stages(
            trajectory, Protocol.of(tokenizer), tokenizer.decode, [tokenizer.eos_token_id], 10, 40
        )

    return make


DEEP = "7 <EOR> \\boxed{7}.<EOA>"


def test_a_good_completion_by_hand(stages, tokenizer):
    result = stages(["<skip>", "1 2 3<EOT>"], DEEP)
    deep = len(tokenizer(DEEP).input_ids)
    assert (
        result.lengths.tolist() == [1, 4]
        and result.skipped.tolist() == [True, False]
        and result.deep_length == deep
    )
    assert (
        result.closed.all() and result.deep_format == result.streaming_format == result.format == 1
    )
    # 1 - 1/10 and 1 - 4/10; together 1 - 5/20.
    np.testing.assert_allclose(result.thoughts, [0.9, 0.6])
    assert result.deep_thought == pytest.approx(1 - deep / 40)
    brevity = 0.5 * (1 - deep / 40)
    assert result.rewards(OPTIONS) == pytest.approx(
        (1.2, 0.2 + 0.3 * 0.75 + 0.8 * brevity, 0.2 + 1 + brevity)
    )
    np.testing.assert_allclose(
        result.sentence_rewards(OPTIONS),
        [0.2 + 0.3 * 0.9 + 0.8 * brevity, 0.2 + 0.3 * 0.6 + 0.8 * brevity],
    )
    assert result.sentence_rewards(OPTIONS).mean() == pytest.approx(result.rewards(OPTIONS)[1])


def test_a_wrong_answer_earns_its_format_alone(stages):
    assert stages(["<skip>"], DEEP, score=0.0).rewards(OPTIONS) == pytest.approx((0.2, 0.2, 0.2))


def test_without_weights_accuracy_is_all(stages):
    options = SimpleNamespace(format_weight=0, streaming_weight=0, deep_weight=0, deep_credit=1)
    assert stages(["1 <EOR><EOT>", "<skip>"], DEEP).rewards(options) == (1, 0, 1)


@pytest.mark.parametrize(
    "slot, forced, right",
    [
        ("1<EOT>", (), True),
        ("<skip>", (), True),
        ("<EOT>", (), True),
        ("1<EOT>", (0,), False),  # closed at the limit, not by the model
        ("1<skip>", (), False),
        ("1<EOR>2<EOT>", (), False),
        ("<|endoftext|>1<EOT>", (), False),
        ("<SEP><EOT>", (), False),
    ],
)
def test_the_form_of_a_slot(stages, slot, forced, right):
    result = stages([slot, "<skip>"], DEEP, forced=forced)
    assert (
        result.closed.tolist() == [right, True]
        and result.streaming_format == (2 if right else 1) / 2
    )
    assert result.rewards(OPTIONS)[0] == pytest.approx(1 + 0.2 * result.streaming_format)
    assert result.skipped.tolist() == [slot == "<skip>", True]


@pytest.mark.parametrize(
    "deep, finish, right",
    [
        (DEEP, "stop", True),
        ("<EOR>\\boxed{7}<EOA>", "stop", True),
        ("7 <EOR> \\boxed{7}.<|endoftext|>", "stop", True),
        (DEEP, "length", False),
        ("7 \\boxed{7}<EOA>", "stop", False),
        ("<EOR> 7 <EOR> \\boxed{7}<EOA>", "stop", False),
        ("<EOR> 7<EOA>", "stop", False),
        ("<EOR> \\boxed{<EOA>", "stop", False),
        ("<EOR> \\boxed{7} \\boxed{8}<EOA>", "stop", False),
        ("\\boxed{7} <EOR> \\boxed{7}<EOA>", "stop", False),
        ("1 <EOT> <EOR> \\boxed{7}<EOA>", "stop", False),
        ("<EOR> <skip> \\boxed{7}<EOA>", "stop", False),
        ("<EOA>", "stop", False),
    ],
)
def test_the_form_of_the_deep_segment(stages, deep, finish, right):
    result = stages(["<skip>"], deep, finish=finish)
    assert result.deep_format == result.format == right
    assert result.rewards(OPTIONS)[2] == pytest.approx(0.2 * right + 1 + 0.5 * result.deep_thought)


def test_the_source_between_thoughts_does_not_count(tokenizer):
    protocol = Protocol.of(tokenizer)
    ids = [9, protocol.eot, 8, protocol.eos, protocol.skip, protocol.eor, protocol.eoa]
    trajectory = Trajectory(
        0,
        0,
        [1],
        ids,
        "stop",
        score=1.0,
        slots=np.array([0, 0, -1, -1, 1, 2, 2]),
        sampled=np.array([1, 1, 0, 0, 1, 1, 1], dtype=bool),
    )
    result = score_stages(trajectory, protocol, tokenizer.decode, [], 10, 40)
    assert result.lengths.tolist() == [2, 1] and result.deep_length == 2 and result.closed.all()
