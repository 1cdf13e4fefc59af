"""A teacher with another tokenizer: spans are the actions, against their formula and against a
teacher that shares the student's tokens."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from recipes.compose import compose
from recipes.errors import ConfigError, DataError, ModelError
from rollouts.trajectory import Trajectory
from scripts.new_model import qwen3, save
from tests.trainers.test_served_teacher import Faulty
from trainers.conformance.stand_ins import TinyTeacher, Words
from trainers.conformance.subjects import Setup
from trainers.conformance.world import PROMPTS, TinyPolicy, tree
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy
from trainers.core.retokenized import RetokenizedTeacher, Retokenizer
from trainers.core.teachers import make_one
from trainers.loop import Loop
from trainers.opd import EPSILON
from trainers.prepare import prepare
from trainers.spans import check_own_tokenizer, score_spans, span_metrics

OWN = "teacher.tokenizer=own"


# Against the formula


class Letters(Words):
    """A codec of tokens that are these texts; the longest that fits comes first."""

    def bytes_of(self, ids, spaced=False):
        return [self.texts[id].encode() for id in ids]

    def encode(self, text, spaced=False):
        ids = self._ids(text)
        ends = list(itertools.accumulate(len(self.texts[id]) for id in ids))
        return ids, list(zip([0, *ends], ends))

    def spaced(self, prompt):
        return False


STUDENT = ("<end>", "a", "b", "ab")
TEACHER = ("b", "a", "ba", "<end>", "bb")
PROMPT = (4, 1)  # as the teacher reads it


def exact_setup(*overrides, student=STUDENT, teacher=TEACHER, **options):
    """A trainer on the small policy with a teacher that has five tokens of its own."""
    setup = Setup(("recipe=opd", "reward.terminal_stop=raw", OWN, *overrides), **options)
    run = setup.run
    pair = Retokenizer(
        None, Letters(student), Letters(teacher), teacher.index("<end>"), len(teacher), (), None, 99
    )
    run.retokenizer, run.teacher_prompts = pair, dict.fromkeys(range(3), PROMPT)
    setup.teacher = TinyPolicy(2, len(teacher), width=5, float32_states=True)
    run.teacher = RetokenizedTeacher(TinyTeacher(pair.view(run), setup.teacher), run)
    return setup


def by_hand(setup, completion):
    """log q of each token (differentiable), and of each span its tokens and its log p."""
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    student = table[list(completion.places), list(completion.ids)]
    stopped = completion.finish_reason == "stop"
    ids = completion.ids[:-1] if stopped else completion.ids
    texts = [STUDENT[id] for id in ids]
    taught = Words(TEACHER)("".join(texts)).input_ids
    ends, cuts = (
        list(itertools.accumulate(map(len, parts)))
        for parts in (texts, [TEACHER[id] for id in taught])
    )
    taught += [3] if stopped else []
    with torch.no_grad():
        logits = [setup.teacher.logits([*PROMPT, *taught[:place]]) for place in range(len(taught))]
        teacher = [row.log_softmax(-1)[id] for row, id in zip(logits, taught)]
    found, i, j = [], 0, 0
    for place in sorted(set(ends) & set(cuts)):
        next_i, next_j = ends.index(place) + 1, cuts.index(place) + 1
        found.append((range(i, next_i), sum(teacher[j:next_j])))
        i, j = next_i, next_j
    if stopped:
        found.append((range(i, i + 1), teacher[-1]))
    return student, found


REWARDS = {
    "log_ratio": lambda p, q: p - q,
    "power": lambda p, q: p.exp() ** 5 - q.exp() ** 5,
    "tanh": lambda p, q: torch.tanh((p - q) / 5),
    "sign": lambda p, q: (p - q).sign(),
}


@pytest.mark.parametrize("token", REWARDS)
def test_the_expected_gradient_is_that_of_spans_as_actions(token):
    """Over all completions of three tokens: - E[sum_s r(log p_s, log q_s) grad log q_s]."""
    setup = exact_setup(f"reward.token={token}", "reward.teacher_weight=2")
    terms, sizes = [], []
    for completion in tree(3).completions:
        student, found = by_hand(setup, completion)
        drawn = student.sum().detach().exp()
        for tokens, teacher in found:
            action = student[list(tokens)].sum()
            reward = 2 * REWARDS[token](teacher, action.detach())
            terms.append(-drawn * reward * action)
            sizes.append(len(tokens))
    expected = setup.policy.gradient_of(sum(terms))
    torch.testing.assert_close(setup.expected(), expected, rtol=1e-9, atol=1e-12)
    assert {1, 2, 3} <= set(sizes)


def test_standardised_rewards_are_of_spans():
    setup = exact_setup("reward.token=zscore", samples=2)
    pair = [one for one in tree(3).completions if one.ids in ((2, 1, 3), (3, 2, 0))]
    values = []
    for completion in pair:
        student, found = by_hand(setup, completion)
        for tokens, teacher in found:
            gap = teacher - student[list(tokens)].sum().detach()
            values += [gap] * len(tokens)
    flat = torch.stack(values)
    expected = (flat - flat.mean()) / (flat.std(correction=0) + EPSILON)
    outputs = setup.update(setup.draw(pair)).outputs
    outputs.sort(key=lambda output: output[0].sample_index)
    found = np.concatenate([output["rewards"] for _, output in outputs])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("token", "task"), [("log_ratio", 0), ("power", 0.5), ("zscore", 0.5), ("sign", 0)]
)
def test_where_each_span_is_a_token_it_is_the_plain_path(token, task):
    """Both have the same tokens, of which no two make a third."""
    keys = [f"reward.token={token}", f"reward.task_weight={task}", "reward.teacher_weight=0.5"]
    texts = ("<end>", "\\boxed{7}", "a", "b")
    policy = TinyPolicy(2, 4, width=5, float32_states=True)
    plain = Setup(("recipe=opd", "reward.terminal_stop=raw", *keys), samples=2, teacher=policy)
    own = exact_setup(*keys, student=texts, teacher=texts, samples=2)
    own.run.teacher.teacher.policy = policy
    own.run.teacher_prompts[0] = PROMPTS[0]
    long = [one for one in tree(3).completions if len(one.ids) == 3]
    updates = [setup.update(setup.draw((long[1], long[-1]))) for setup in (plain, own)]
    assert updates[0].tokens == updates[1].tokens == 6
    torch.testing.assert_close(updates[0].gradient, updates[1].gradient, rtol=1e-6, atol=1e-9)
    assert updates[0].gradient.abs().max() > 1e-3
    for (before, plainly), (after, owned) in zip(*(update.outputs for update in updates)):
        np.testing.assert_allclose(owned["rewards"], plainly["rewards"], rtol=1e-5, atol=1e-7)
        names = "teacher_logprobs", "mask"
        for one, other in ((before.annotations[n], after.annotations[n]) for n in names):
            np.testing.assert_allclose(one, other, rtol=1e-9)


def annotated(mask, numbers, taught, student):
    trajectory = Trajectory(0, 0, [1], [2] * len(mask), "length")
    trajectory.annotations |= {
        "mask": np.array(mask, bool),
        "spans": np.array(numbers),
        "span_teacher_logprobs": np.array(taught, np.float32),
        "student_logprobs": np.array(student, np.float32),
    }
    return trajectory


def test_a_span_counts_where_all_its_tokens_do_and_its_difference_is_shared_evenly():
    student = [-1, -2, -3, -4, -0.5, -0.25]
    trajectory = annotated(
        [1, 1, 1, 0, 1, 1], [0, 0, -1, 2, 2, 5], [-6, -6, 0, -1, -1, -1], student
    )
    score_spans([trajectory])
    annotations = trajectory.annotations
    assert annotations["mask"].tolist() == [True, True, False, False, False, True]
    np.testing.assert_allclose(annotations["span_student_logprobs"], [-3, -3, 0, -4.5, -4.5, -0.25])
    expected = [-2.5, -3.5, -3, -2.25, 1.25, -1]
    np.testing.assert_allclose(annotations["teacher_logprobs"], expected)
    shares, sizes = span_metrics(trajectory).values()
    assert shares[0][shares[1]].mean() == pytest.approx(5 / 6)
    assert sizes[0][sizes[1]].tolist() == [2, 2, 1]
    nothing = annotated([1, 1], [-1, -1], [0, 0], [-1, -2])
    score_spans([nothing])
    assert (
        not nothing.annotations["mask"].any()
        and not span_metrics(nothing)["teacher/span_tokens"][1].any()
    )


# Against real models


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer, space_tokenizer):
    """Tiny teachers with tokenizers of their own."""
    made = {}
    for name, tokenizer in (("byte", byte_tokenizer), ("space", space_tokenizer)):
        made[name] = tmp_path_factory.mktemp("own") / name
        torch.manual_seed(5)
        config = qwen3(tokenizer, hidden=64, layers=2, heads=2, vocab=len(tokenizer) + 3)
        save(made[name], Qwen3ForCausalLM(config), tokenizer)
    return made


@pytest.fixture
def prepared(overrides):
    def make(*keys, **named):
        defaults = {"rollout__engine": "hf", "eval__every": -1}
        return prepare(compose([*overrides(**defaults | named), *keys]))

    return make


def completions(run, *texts: str, finish: str = "stop") -> list[Trajectory]:
    """What the student writes, in its own tokens."""
    made = []
    for prompt, text in zip(itertools.cycle(run.prompts), texts):
        ids = run.tokenizer(text).input_ids + [run.stop_ids[0]] * (finish == "stop")
        made.append(Trajectory(prompt.index, 0, list(prompt.token_ids), ids, finish))
        made[-1].annotations["teacher_targets"] = np.array(ids)
    return made


WRITTEN = "Start: 12. 12 - 5 = 7. É漢🙂<|im_end|> </s>", "  two\n\nlines", "\\boxed{7}"


@pytest.mark.parametrize("name", ["byte", "space"])
def test_the_teacher_scores_the_text_in_its_own_tokens(prepared, folders, name):
    keys = {"teacher__path": folders[name], "teacher__prompt": "'Know {answer}. {prompt}'"}
    run = prepared(OWN, **keys)
    pair = run.retokenizer
    # Three rows of the head are no tokens; those of the student are no matter.
    assert run.vocab == len(run.tokenizer) and pair.vocab == len(pair.tokenizer) != run.vocab
    assert not set(pair.tokenizer.all_special_ids) & set(run.stop_ids[1:])
    made = completions(run, *WRITTEN)
    make_one(run.config.teacher, run).annotate(made)
    model = Qwen3ForCausalLM.from_pretrained(folders[name]).eval()
    shorter = 0
    for trajectory, text in zip(made, WRITTEN):
        example = run.prompts[trajectory.prompt_index].example
        prompt = list(run.teacher_prompts[trajectory.prompt_index])
        read = f"Know {example.answer}. {example.messages[-1]['content']}"
        assert prompt == pair.tokenizer(read).input_ids
        # As the tokenizer encodes a text by itself, but that it reads no special tokens.
        ids = pair.tokenizer(text, split_special_tokens=True).input_ids
        ids = [*ids, pair.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = logits[:, : pair.vocab].log_softmax(-1)[range(len(ids)), ids]
        numbers = trajectory.annotations["spans"]
        first = np.append(True, numbers[1:] != numbers[:-1])
        sums = trajectory.annotations["span_teacher_logprobs"][first]
        assert (numbers >= 0).all()
        shorter += first.sum() < len(numbers)
        assert sums.sum() == pytest.approx(float(own.sum()), rel=1e-5)
        assert sums[-1] == pytest.approx(float(own[-1]), rel=1e-4)
        assert "teacher_targets" not in trajectory.annotations
    assert shorter


def test_a_shared_tokenizer_read_as_its_own_gives_the_same_rewards(prepared):
    """Of texts in the tokens that the tokenizer itself makes."""
    found = []
    for mode in ("shared", "own"):
        run = prepared(f"teacher.tokenizer={mode}", "reward.terminal_stop=cross_eos")
        load_policy_of(run)
        texts = [prompt.example.solution for prompt in run.prompts[:3]]
        made = completions(run, *texts)
        run.teacher = make_one(run.config.teacher, run)
        trainer = run.method(run)
        trainer.annotate(made)
        run.score_policy(made, "old_logprobs")
        rewards = [t.annotations.get("advantages") for t in made]
        if mode == "shared":
            names = "teacher_logprobs", "old_logprobs"
            rewards = [
                trainer.reward(*(torch.from_numpy(t.annotations[name]) for name in names)).numpy()
                for t in made
            ]
        else:
            assert all(len(set(t.annotations["spans"])) == len(t.completion_ids) for t in made)
        taught = [t.annotations["teacher_logprobs"] for t in made]
        found.append((np.concatenate(rewards), np.concatenate(taught)))
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-4)


def load_policy_of(run):
    """Give the run the loop's part that scores, without DeepSpeed."""
    policy = load_policy(run.config.model.path, torch.float32, run.device).eval()
    engine = object.__new__(PolicyEngine)
    engine.policy, engine.engine, engine.adapted, engine.config = policy, policy, {}, run.config
    loop = object.__new__(Loop)
    loop.run, loop.config, loop.engine = run, run.config, engine
    run.score_policy = loop.score_policy


def test_cut_letters_and_a_short_context_leave_spans_out(prepared, folders):
    run = prepared(OWN, teacher__path=folders["byte"])
    [trajectory] = completions(run, "cut: é漢", finish="length")
    # Between two letters there is half of another, and the last one is cut.
    half = run.tokenizer("🙂").input_ids[:1]
    ids = trajectory.completion_ids
    trajectory = replace(trajectory, completion_ids=[*ids[:3], *half, *ids[3:-1]])
    prompt = run.teacher_prompts[trajectory.prompt_index]
    pair = run.retokenizer
    [(taught, found)] = pair.align([trajectory], [prompt])
    text = pair.tokenizer.decode(taught).lstrip()
    assert text.startswith("cut") and text.endswith("é\ufffd") and text.count("\ufffd") == 2
    out = [span for span in found if not span.same]
    assert len(out) == 2 and out[-1].end == len(trajectory.completion_ids)
    # Where the context ends, the teacher reads no more, and nothing after it is scored.
    short = replace(pair, room=len(prompt) + 2)
    [(taught, same)] = short.align([trajectory], [prompt])
    assert len(taught) == 2 and same == found
    run.retokenizer = short
    teacher = make_one(run.config.teacher, run)
    assert short.longest([prompt]) == len(prompt) + 2
    teacher.annotate([trajectory])
    numbers = trajectory.annotations["spans"]
    kept = [span for span in found if span.teacher_end <= 2]
    assert (numbers >= 0).sum() == sum(span.end - span.start for span in kept) > 0
    # And where there is no room at all, nothing is asked.
    run.retokenizer = replace(pair, room=len(prompt))
    make_one(run.config.teacher, run).annotate([trajectory])
    assert (trajectory.annotations["spans"] == -1).all()


def test_a_served_teacher_is_asked_in_its_own_tokens(prepared, folders):
    """The server gives each token -2 nats."""
    server = Faulty(folders["space"])
    try:
        url = {"teacher__path": folders["space"], "teacher__url": server.url}
        run = prepared(OWN, **url)
        assert any(
            "3 rows of the head that are no tokens of the teacher" in m for m in run.messages
        )
        made = completions(run, *WRITTEN)
        make_one(run.config.teacher, run).annotate(made)
    finally:
        server.stop()
    for trajectory in made:
        [(ids, found)] = run.retokenizer.align([trajectory], [[1]])
        for span in found:
            sums = trajectory.annotations["span_teacher_logprobs"][span.start : span.end]
            assert (sums == -2 * (span.teacher_end - span.teacher_start)).all()
        assert ids[-1] == run.retokenizer.stop and found[-1].teacher_end == len(ids)


def trained(overrides, tmp_path, *keys):
    folder = tmp_path / "own"
    quick = {"rollout__engine": "hf", "eval__every": -1, "run__dir": folder}
    loop = Loop(prepare(compose([*overrides(**quick), *keys])))
    loop.fit()
    loop.finish()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_steps(overrides, folders, tmp_path):
    keys = [OWN, "reward.token=tanh", "reward.terminal_stop=raw", "model.path=stories-student"]
    rows = trained(overrides, tmp_path, *keys, f"teacher.path={folders['byte']}")
    assert len(rows) == 2
    for row in rows:
        assert row["train/loss"] != 0 and row["train/grad_norm"] > 0
        assert 0.9 < row["teacher/aligned_frac"] <= 1 and row["teacher/span_tokens"] > 1
        assert row["teacher/kl"] > 0 and not {"teacher/tv", "teacher/agreement"} & row.keys()
    assert rows[1]["teacher/kl"] != rows[0]["teacher/kl"]


# What is refused


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["objective=reverse_kl"], "objective=reverse_kl compares distributions"),
        (["rollout.temperature=0.7"], "rollout.temperature=0.7 changes"),
        (["teachers.one.path=a"], "teachers.one is of several teachers"),
        (["teacher.path=self"], "teacher.path=self has the student's tokenizer"),
        (["reward.select.score=dial"], "reward.select.score=dial selects tokens"),
        (["reward.terminal_stop=relabel"], "reward.terminal_stop=relabel lets the student"),
        (["reward.importance_cap=2"], "reward.importance_cap=2.0 weights tokens"),
    ],
)
def test_keys_without_a_meaning_are_refused(keys, said):
    config = compose([OWN, *keys])
    with pytest.raises(ConfigError, match="^teacher.tokenizer=own: ") as caught:
        check_own_tokenizer(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    check_own_tokenizer(replace(config, teacher=replace(config.teacher, tokenizer="shared")))


def test_a_source_that_is_read_in_steps_is_refused():
    """Trainers from outside may have both sections."""
    layout = SimpleNamespace(layout="grouped")
    with pytest.raises(ConfigError, match="own: streaming.layout=grouped reads a source in steps"):
        check_own_tokenizer(SimpleNamespace(**vars(compose([OWN])), streaming=layout))


def test_methods_that_score_the_students_tokens_are_refused(capsys, tmp_path):
    from scripts import cache_teacher, divergence

    places = ["teacher=stories-teacher", "data=stories", f"out={tmp_path / 'cache'}"]
    model = "model=stories-student"
    assert cache_teacher.main([*places, model, OWN]) == 1
    assert "teacher.tokenizer=own: recipe=distill needs" in capsys.readouterr().err
    assert divergence.main([*places[:2], model, OWN]) == 1
    assert "teacher.tokenizer=own: whole distributions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["words", "lower"])
def test_a_tokenizer_that_does_not_give_text_back_is_refused(
    prepared, folders, byte_tokenizer, tmp_path, kind
):
    backend = type(byte_tokenizer.backend_tokenizer).from_str(
        byte_tokenizer.backend_tokenizer.to_str()
    )
    if kind == "words":
        backend.model = models.WordLevel({"<stop>": 0, "a": 1}, unk_token="<stop>")
        backend.decoder = decoders.WordPiece()
    else:
        backend.normalizer = normalizers.Lowercase()
    folder = tmp_path / kind
    config = AutoTokenizer.from_pretrained(folders["byte"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=config.eos_token).save_pretrained(
        folder
    )
    (folder / "config.json").write_text((folders["byte"] / "config.json").read_text())
    wrong, said = {
        "words": (ModelError, "and its tokens are neither byte-level nor SentencePiece's"),
        "lower": (DataError, "its tokenizer makes '"),
    }[kind]
    with pytest.raises(wrong, match=f"^teacher.path={folder}: ") as caught:
        prepared(OWN, teacher__path=folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_another_vocabulary_is_refused_with_a_hint(prepared, folders):
    with pytest.raises(ModelError, match="needs one tokenizer, or teacher.tokenizer=own$"):
        prepared(teacher__path=folders["byte"])
