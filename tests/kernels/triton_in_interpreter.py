"""Triton against its torch twins, in Triton's interpreter on the CPU; test_triton_interpreter.py
starts this file in a process of its own, since the interpreter is chosen when triton is
imported."""

import pytest
import torch

import kernels
from kernels import tiled_head
from kernels.backend import interpreted

assert interpreted(), "TRITON_INTERPRET=1 must be set: otherwise nothing here is tested"

TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
}
DTYPES = list(TOLERANCE)
VOCABULARIES = [1, 2, 127, 128, 129, 1003, 4099]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Uninitialised memory is NaN, and tiles are so narrow that small vocabularies have several."""
    torch.use_deterministic_algorithms(True)  # with this, torch.empty is filled with NaN
    monkeypatch.setitem(
        tiled_head.TILINGS, "cpu", tiled_head.Tiling(rows=4, columns=256, workspace=8 * 4 * 1100)
    )
    yield
    torch.use_deterministic_algorithms(False)


def problem(V, dtype, T=3, H=5, seed=0, scale=2.0):
    """Logits, hidden states and heads, ids on every border there is, and one masked row that holds
    NaN."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    x = {
        "hidden": rand(T, H),
        "weight": rand(V, H),
        "logits": rand(T, V),
        "other": rand(T, V),
        "teacher_hidden": rand(T, H + 1),
        "teacher_weight": rand(V, H + 1),
        "bias": rand(V),
        "lp": -rand(T).abs(),
        "advantages": rand(T),
        "old": -rand(T).abs(),
        "mask": torch.ones(T, dtype=torch.bool),
        "ids": torch.tensor([V - 1, 0, min(256, V - 1), min(255, V - 1), V // 2])[:T],
    }
    if T > 2:
        x["mask"][1] = False
        for name in ("hidden", "logits", "other", "lp", "advantages", "old"):
            x[name][1] = torch.nan
    return x


def both(function, inputs, dtype, **tolerance):
    """`function(inputs)` gives tensors to compare and a scalar to differentiate; it runs on either
    backend."""
    results = []
    for backend in ("torch", "triton"):
        kernels.set_backend(backend)
        leaves = {
            k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()
        }
        outputs, scalar = function(leaves)
        scalar.backward()
        grads = [v.grad for v in leaves.values() if v.grad is not None]
        assert grads
        results.append([x.detach() for x in [*outputs, scalar] if x is not None] + grads)
    assert len(results[0]) == len(results[1])
    for want, got in zip(*results):
        assert want.dtype == got.dtype and torch.isfinite(got).all()
        torch.testing.assert_close(got, want, **(TOLERANCE[dtype] | tolerance))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_logits(V, dtype):
    def run(x):
        out = kernels.selective_logprobs(
            x["logits"],
            x["ids"],
            mask=x["mask"],
            temperature=0.7,
            return_entropy=True,
            return_lse=True,
        )
        return out, (out.logprobs * 3 + out.entropy * 0.3 - out.lse).sum()

    both(run, problem(V, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_with_strides_padding_several_ids_and_excluded_tokens(dtype):
    x = problem(300, dtype)
    x["logits"][0, 7:250] = -torch.inf
    ids = torch.tensor([[0, 5, 0], [9, 9, 9], [279, 255, 256]])

    def run(x):
        wide = torch.stack([x["logits"], x["logits"] * 2], 1)[:, 1]  # row stride 2 V
        out = kernels.selective_logprobs(
            wide, ids, valid_vocab_size=280, mask=x["mask"], return_entropy=True
        )
        columns = kernels.selective_logprobs(
            (x["logits"] + 1).t().contiguous().t(), ids[:, 0], mask=x["mask"]
        )
        return out, (out.logprobs.sum(1) + out.entropy + columns.logprobs).sum()

    both(run, {"logits": x["logits"], "mask": x["mask"]}, dtype)


def test_logits_in_place():
    x = problem(300, torch.float32, scale=1.0)["logits"]
    grads = []
    for backend in ("torch", "triton"):
        kernels.set_backend(backend)
        leaf = x.nan_to_num(1.0).requires_grad_()
        logits = leaf * 1
        kernels.selective_logprobs(
            logits, torch.tensor([0, 5, 299]), temperature=2, inplace_backward=True
        ).logprobs.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES[1:])
def test_head(V, dtype):
    def run(x):
        out = kernels.fused_linear_logprobs(
            x["hidden"],
            x["weight"],
            x["ids"],
            mask=x["mask"],
            bias=x["bias"],
            temperature=1.5,
            logit_softcap=20.0,
            return_entropy=True,
            return_lse=True,
        )
        return out, (out.logprobs - 0.2 * out.entropy + out.lse).sum()

    both(
        run,
        {
            k: v
            for k, v in problem(V, dtype).items()
            if k in ("hidden", "weight", "bias", "ids", "mask")
        },
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_with_excluded_tokens_far_logits_and_rows(dtype):
    """A common offset, whole tiles at -inf through the bias, logits of +-1e4, and more rows than a
    GEMM takes."""
    x = problem(700, dtype, T=5, H=4)
    x["bias"][:300] = -torch.inf
    x["bias"][400] = 1e4
    x["ids"] = torch.tensor([400, 0, 699, 512, 511])
    x["bias"][500:] += 1e4

    def run(x):
        out = kernels.fused_linear_logprobs(
            x["hidden"],
            x["weight"],
            x["ids"],
            mask=x["mask"],
            bias=x["bias"].detach(),
            return_entropy=True,
        )
        return out, (out.logprobs + out.entropy).sum()

    both(
        run,
        {k: x[k] for k in ("hidden", "weight", "bias", "ids", "mask")},
        dtype,
        rtol=1e-5,
        atol=1e-3,
    )


def test_top_k():
    x = problem(700, torch.float32)
    for backend in ("torch", "triton"):
        kernels.set_backend(backend)
        out = kernels.fused_linear_topk_logprobs(x["hidden"], x["weight"], 5, mask=x["mask"])
        if backend == "torch":
            want = out
    assert torch.equal(out.ids, want.ids)
    torch.testing.assert_close(out.logprobs, want.logprobs, rtol=2e-6, atol=2e-6)


OPD = {
    "power": {"alpha": 0.7},
    "paper": {"alpha": 2.0, "normalization": "none", "entropy_coef": 0.1},
    "tiny_alpha": {"alpha": 1e-6},
    "log_ratio": {"alpha": 0.0},
    "clip": {"reward": "log_ratio", "clip": 0.5},
    "tanh": {"reward": "log_ratio", "tanh_scale": 2.0},
    "ppo": {"objective": "ppo_clip", "dual_clip": 1.5, "old": True},
    "cispo": {"objective": "cispo", "old": True},
    "sampler": {"is_cap": 1.1, "old": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPD)
def test_opd(kind, dtype):
    options = dict(OPD[kind])
    old = options.pop("old", False)

    def run(x):
        extra = {"old_logprobs": x["old"].detach()} if old else {}
        if "is_cap" in options:
            extra["rollout_logprobs"] = x["lp"].detach() * 1.1
        out = kernels.fused_linear_opd_loss(
            x["hidden"],
            x["weight"],
            x["ids"],
            x["lp"].detach(),
            denominator=3.0,
            advantages=x["advantages"].detach(),
            mask=x["mask"],
            return_entropy=True,
            loss_scale=0.5,
            **options,
            **extra,
        )
        return [*out[1:4], *out.stats.values()], out.loss

    both(run, problem(700, dtype, T=5, scale=0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", ["reinforce", "ppo_clip", "cispo"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_policy_gradient_over_several_programs(objective, aggregation, dtype):
    T = 1100
    x = problem(2, dtype, T=5)
    g = torch.Generator().manual_seed(1)
    x = {
        name: torch.randn(T, generator=g, dtype=torch.float64).to(dtype)
        for name in ("lp", "advantages", "old")
    }
    x["mask"] = torch.rand(T, generator=g) > 0.3
    for name in ("lp", "advantages", "old"):
        x[name][~x["mask"]] = torch.nan

    def run(x):
        out = kernels.policy_gradient_loss(
            -x["lp"].abs(),
            x["advantages"].detach(),
            denominator=7.0,
            mask=x["mask"],
            old_logprobs=-x["old"].detach().abs(),
            objective=objective,
            aggregation=aggregation,
            seq_ids=torch.arange(T) // 100,
        )
        return out.stats.values(), out.loss

    both(run, {k: v for k, v in x.items()}, dtype)


@pytest.mark.parametrize("alpha", [1e-8, 1e-6, 1e-2, 0.1, 1.0, 5.0, 20.0])
def test_power_reward_of_near_equal_pairs(alpha):
    """Relative error at most 1e-5 and no wrong sign on 400,000 pairs that differ by as little as
    1e-8."""
    g = torch.Generator().manual_seed(0)
    lq = -torch.rand(400_000, generator=g) * 6
    gap = 10 ** (torch.rand(400_000, generator=g) * 9 - 8)
    lp = (lq + gap * (torch.rand(400_000, generator=g) - 0.5).sign()).clamp(max=0)
    kernels.set_backend("triton")
    got = kernels.power_reward(lp, lq, alpha)
    kernels.set_backend("torch")
    want = kernels.power_reward(lp.double(), lq.double(), alpha)
    normal = want.abs() > 1e-36  # below that float32 has no 24 digits, and then none
    assert (got.double() * want >= 0).all() and torch.equal(
        got[normal].sign(), (lp - lq)[normal].sign()
    )
    assert ((got.double() - want).abs() / want.abs().clamp_min(1e-300))[normal].max() <= 1e-5


def test_rewards_at_the_edges():
    inf = torch.inf
    lp = torch.tensor([-inf, -1.0, -inf, 1e-7, -3.0, -90.0, torch.nan])
    lq = torch.tensor([-1.0, -inf, -inf, 0.0, -3.0, -1e-3, 0.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0], dtype=torch.uint8)
    for function in (
        lambda: kernels.power_reward(lp, lq, 1.0, mask=mask),
        lambda: kernels.power_reward(lp, lq, 20.0, normalization="none", mask=mask),
        lambda: kernels.log_ratio_reward(lp, lq, clip=3.0, mask=mask),
        lambda: kernels.log_ratio_reward(lp, lq, tanh_scale=3.0, mask=mask),
        lambda: kernels.log_ratio_reward(lp, lq, mask=mask),
    ):
        kernels.set_backend("torch")
        want = function()
        kernels.set_backend("triton")
        torch.testing.assert_close(function(), want, rtol=2e-6, atol=1e-7)


def test_nan_reaches_rewards_and_losses():
    """Of a number and NaN, a GPU's minimum is the number."""
    kernels.set_backend("triton")
    lp = torch.tensor([torch.nan, -1.0, -1.0])
    for reward in (
        lambda *pair: kernels.power_reward(*pair, 0.7),
        lambda *pair: kernels.log_ratio_reward(*pair, clip=3.0),
        lambda *pair: kernels.log_ratio_reward(*pair, tanh_scale=3.0),
        kernels.log_ratio_reward,
    ):
        assert reward(lp, lp.roll(1)).isnan().tolist() == [True, True, False]
    names = ("logprobs", "advantages", "old_logprobs", "rollout_logprobs")
    for objective in ("reinforce", "ppo_clip", "cispo"):
        for name in names:
            given = dict.fromkeys(names, torch.full((3,), -1.0)) | {name: lp}
            out = kernels.policy_gradient_loss(
                **given, objective=objective, is_cap=2.0, denominator=1.0
            )
            assert out.loss.isnan(), (objective, name)


DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {"beta": 0.3},
    "power": {"alpha": 0.7},
    "power_paper": {"divergence": "power", "alpha": 3.0, "normalization": "none"},
    "power_0": {"divergence": "power", "alpha": 0.0},
    "jsd_1": {"divergence": "jsd", "beta": 1.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("V", [2, 129, 1003])
def test_divergence_from_logits(kind, V, dtype):
    options = {"divergence": kind} | DIVERGENCES[kind]

    def run(x):
        out = kernels.distillation_divergence(
            x["logits"],
            x["other"].detach(),
            denominator=3.0,
            mask=x["mask"],
            temperature=1.7,
            **options,
        )
        return [out.divergence], out.loss

    both(
        run, {k: v for k, v in problem(V, dtype).items() if k in ("logits", "other", "mask")}, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "power"])
def test_divergence_from_heads(kind, dtype):
    options = {"divergence": kind} | DIVERGENCES[kind]

    def run(x):
        out = kernels.fused_linear_distillation_divergence(
            x["hidden"],
            x["weight"],
            x["teacher_hidden"].detach(),
            x["teacher_weight"].detach(),
            token_ids=x["ids"],
            student_bias=x["bias"],
            denominator=3.0,
            mask=x["mask"],
            temperature=1.7,
            return_entropy=True,
            **options,
        )
        return [out.divergence, out.logprobs, out.entropy], out.loss

    x = problem(600, dtype, scale=1.0)
    both(run, x, dtype, **({} if dtype == torch.float64 else {"rtol": 1e-5}))


@pytest.mark.parametrize("stop_grad", ["teacher", "none"])
@pytest.mark.parametrize("top_k", [None, 20])
def test_self_distillation(stop_grad, top_k):
    def run(x):
        view = x["hidden"] * 0.9 + 0.1
        out = kernels.fused_linear_self_distillation_kl(
            x["hidden"],
            view,
            x["weight"],
            denominator=3.0,
            mask=x["mask"],
            stop_grad=stop_grad,
            top_k=top_k,
        )
        return [out.divergence], out.loss

    both(
        run,
        {k: v for k, v in problem(600, torch.float64).items() if k in ("hidden", "weight", "mask")},
        torch.float64,
        rtol=1e-9,
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "power"])
def test_no_divergence_of_twins_and_never_negative(kind):
    kernels.set_backend("triton")
    z = torch.randn(3, 3001, generator=torch.Generator().manual_seed(0)) * 4
    same = z.clone().requires_grad_()
    out = kernels.distillation_divergence(same, z, denominator=1.0, divergence=kind)
    out.loss.backward()
    assert out.loss == 0 and (same.grad == 0).all()
    near = z + 1e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    assert (
        kernels.distillation_divergence(near, z, denominator=1.0, divergence=kind).divergence >= 0
    ).all()


def test_half_precision_outputs_differ_by_one_rounding():
    """The interpreter truncates where a GPU rounds, so one unit in the last place is allowed."""
    x = problem(1003, torch.bfloat16, scale=1.0)

    def run(x):
        out = kernels.selective_logprobs(x["logits"], x["ids"], mask=x["mask"])
        return [], out.logprobs.sum()

    both(run, {k: x[k] for k in ("logits", "ids", "mask")}, torch.float32, rtol=2**-7, atol=1e-9)


def test_qwen_vocabulary():
    """V = 151,936 is no multiple of any block; the students' and the teachers' padded sizes
    differ."""
    x = problem(151_936, torch.float32, T=1, H=2)
    teacher = torch.cat([x["other"], torch.full((1, 128), 50.0)], 1)

    def run(x):
        out = kernels.distillation_divergence(
            x["logits"],
            teacher,
            denominator=1.0,
            valid_vocab_size=151_936,
            token_ids=torch.tensor([151_935]),
        )
        return [out.divergence, out.logprobs], out.loss

    both(run, {"logits": x["logits"]}, torch.float32, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_32_bits():
    """Row 2 of these logits starts 2^31 elements after row 0; only the pages that are touched
    exist."""
    stride = 2**30
    storage = torch.empty(0, dtype=torch.bfloat16).untyped_storage()
    torch.use_deterministic_algorithms(False)  # or every page would be filled
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 40), (stride, 1))
    logits.copy_(torch.randn(3, 40, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([0, 7, 39])
    kernels.set_backend("triton")
    got = kernels.selective_logprobs(logits, ids).logprobs
    want = torch.log_softmax(logits.float(), 1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
