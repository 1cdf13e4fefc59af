import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import reference
from kernels import (
    fused_linear_logprobs,
    fused_linear_topk_logprobs,
    selective_logprobs,
    tiled_head,
)
from kernels.rows import exp

ALL = {"return_entropy": True, "return_lse": True, "return_max_logprob": True}


def oracle(z, ids):
    """(logprobs, lse, entropy, max_logprob) from float64 logits."""
    lp = torch.log_softmax(z, -1)
    # 0 log 0 is 0 in an entropy, and NaN in floating point.
    entropy = reference.entropy(lp.clamp_min(-1e4))
    return reference.picked(lp, ids), z.logsumexp(1), entropy, lp.amax(1)


def close(out, expected, live=None, **tolerance):
    for got, want in zip(out, expected):
        live_ = torch.ones(len(got), dtype=torch.bool) if live is None else live
        torch.testing.assert_close(got[live_].double(), want[live_], **tolerance)
        assert (got[~live_] == 0).all()


@pytest.mark.parametrize(
    ("T", "V", "H"), [(1, 1, 1), (3, 2, 40), (70, 127, 16), (5, 3051, 3), (5, 500, 5000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_oracle(problem, T, V, H, dtype):
    p = problem(T, V, H, dtype, scale=1 if H < 100 else 0.2)
    exact = {"rtol": 0, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 2e-5}
    expected = oracle(reference.head_logits(p.hidden, p.weight), p.ids)
    close(fused_linear_logprobs(p.hidden, p.weight, p.ids, **ALL), expected, **exact)
    logits = reference.head_logits(p.hidden, p.weight).to(dtype)
    close(selective_logprobs(logits, p.ids, **ALL), oracle(logits.double(), p.ids), **exact)


def test_head_options(problem, head):
    p = problem(7, 2100, 5)
    options, naive = head(p)
    expected = oracle(reference.head_logits(p.hidden, p.weight, **naive), p.ids)
    close(
        fused_linear_logprobs(p.hidden, p.weight, p.ids, mask=p.mask, **options, **ALL),
        expected,
        p.mask,
        rtol=0,
        atol=1e-11,
    )


def test_padded_vocabulary_takes_no_part(problem):
    p = problem(5, 2100, 4)
    p.ids.clamp_(max=2059)
    p.weight[2060:] = torch.nan
    expected = oracle(reference.head_logits(p.hidden, p.weight[:2060]), p.ids)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    out = fused_linear_logprobs(hidden, weight, p.ids, valid_vocab_size=2060, **ALL)
    close(out[:3], expected[:3], rtol=0, atol=1e-11)
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert (weight.grad[2060:] == 0).all()
    assert hidden.grad.isfinite().all()
    logits = torch.full((5, 2100), 1e4, dtype=torch.float64)
    logits[:, :2060] = reference.head_logits(p.hidden, p.weight[:2060]).detach()
    logits.requires_grad_()
    out = selective_logprobs(logits, p.ids, valid_vocab_size=2060, **ALL)
    close(out, expected, rtol=0, atol=1e-11)
    out.logprobs.sum().backward()
    assert (logits.grad[:, 2060:] == 0).all()
    top = fused_linear_topk_logprobs(p.hidden, p.weight, 3, valid_vocab_size=2060)
    assert (top.ids < 2060).all()


@pytest.mark.parametrize("K", [None, 3])
def test_gradcheck(problem, K):
    p = problem(3, 11, 5)
    ids = p.ids if K is None else torch.tensor([[0, 10, 10], [3, 4, 5], [1, 0, 7]])
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]

    def linear(hidden, weight, bias):
        return fused_linear_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            mask=p.mask,
            temperature=0.8,
            logit_softcap=3.0,
            valid_vocab_size=11,
            return_entropy=True,
            return_lse=True,
        )[:3]

    assert torch.autograd.gradcheck(linear, inputs)

    def plain(logits):
        return selective_logprobs(
            logits, ids, mask=p.mask, temperature=0.8, return_entropy=True, return_lse=True
        )[:3]

    assert torch.autograd.gradcheck(plain, [p.rand(3, 11).requires_grad_()])


def test_gradient_over_tiles_and_blocks(problem, head):
    """Against autograd of the naive log-probs, over tiles, row blocks and chunks; any upstream
    gradient."""
    p = problem(300, 2100, 4)
    options, naive = head(p)
    inputs = [
        x.requires_grad_()
        for x in (p.hidden, p.weight, p.bias)
        if x is not p.bias or "bias" in options
    ]
    upstream = [p.rand(p.T) for _ in range(3)]
    out = fused_linear_logprobs(
        p.hidden, p.weight, p.ids, mask=p.mask, return_entropy=True, return_lse=True, **options
    )
    grads = torch.autograd.grad([out.logprobs, out.lse, out.entropy], inputs, upstream)
    expected = oracle(reference.head_logits(p.hidden, p.weight, **naive), p.ids)[:3]
    want = torch.autograd.grad([x * p.mask for x in expected], inputs, upstream)
    torch.testing.assert_close(grads, want, rtol=1e-9, atol=1e-11)


def _tiling_that_keeps(monkeypatch, size):
    tiling = tiled_head.TILINGS["cpu"]._replace(kept=size)
    monkeypatch.setitem(tiled_head.TILINGS, "cpu", tiling)


def test_kept_logits_change_no_gradient(problem, monkeypatch):
    """None, some and all of the tiles kept; two blocks of rows; and a second backward."""
    p = problem(300, 5000, 4)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    found = []
    for kept in (0, 512 * 2048 * 8, 512 * 5000 * 8):
        _tiling_that_keeps(monkeypatch, kept)
        logprobs = fused_linear_logprobs(*inputs, p.ids, mask=p.mask).logprobs.sum()
        found.append(torch.autograd.grad(logprobs, inputs, retain_graph=True))
        found.append(torch.autograd.grad(logprobs, inputs))
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=1e-12, atol=1e-13)


def test_kept_logits_are_bounded(problem):
    p = problem(200, 9000, 4, torch.float32)
    head = tiled_head.HeadInputs(p.hidden, p.weight, None, 1.0, None).tiled(p.V, torch.float32)
    widths = {limit: [t.shape[1] for t in head.workspace(200, limit)] for limit in (0, 5000 * 1024)}
    assert widths == {0: [], 5000 * 1024: [2048, 2048]}
    assert sum(t.shape[1] for t in head.workspace(200)) == p.V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gradients_are_accumulated_in_float32(problem, dtype):
    p = problem(600, 50, 8, dtype)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    grads = torch.autograd.grad(fused_linear_logprobs(*inputs, p.ids).logprobs.sum(), inputs)
    want = torch.autograd.grad(oracle(reference.head_logits(*inputs), p.ids)[0].sum(), inputs)
    for got, exact in zip(grads, want):
        assert got.dtype == dtype
        # only the result is rounded to the dtype
        torch.testing.assert_close(
            got, exact.to(dtype), rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4
        )


@pytest.mark.parametrize(
    ("H", "dtype"), [(7, torch.float32), (64, torch.float32), (33, torch.bfloat16)]
)
def test_rows_do_not_depend_on_the_split(problem, H, dtype):
    """Bitwise: any cut of T, any mask, and the one-by-one calls give the same numbers."""
    p = problem(150, 2500, H, dtype)

    def score(rows, mask=None):
        out = fused_linear_logprobs(p.hidden[rows], p.weight, p.ids[rows], mask=mask, **ALL)
        return torch.stack(out)

    whole = score(slice(None))
    for cut in (1, 3, 17, 63, 64, 65, 149):
        parts = torch.cat([score(slice(cut)), score(slice(cut, None))], 1)
        assert torch.equal(parts, whole), cut
    assert torch.equal(torch.cat([score(slice(i, i + 1)) for i in range(40)], 1), whole[:, :40])
    mask = torch.rand(150) < 0.5
    assert torch.equal(score(slice(None), mask), whole * mask)


def test_masked_rows_may_hold_anything(problem):
    p = problem(8, 40, 6)
    live, junk = p.mask.clone(), ~p.mask
    clean = fused_linear_logprobs(p.hidden, p.weight, p.ids, mask=live, **ALL)
    p.hidden[junk] = torch.nan
    p.ids[junk] = -100
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    out = fused_linear_logprobs(hidden, weight, p.ids, mask=live.to(torch.uint8), **ALL)
    for got, want in zip(out, clean):
        assert torch.equal(got, want)
    (out.logprobs.sum() + out.entropy.sum() + out.lse.sum()).backward()
    assert (hidden.grad[junk] == 0).all()
    assert hidden.grad[live].ne(0).any()
    assert weight.grad.isfinite().all()

    logits = p.rand(8, 40)
    logits[junk] = torch.inf
    logits.requires_grad_()
    out = selective_logprobs(logits, p.ids, mask=live, **ALL)
    assert all((x[junk] == 0).all() for x in out)
    out.logprobs.sum().backward()
    assert (logits.grad[junk] == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("empty", ["T=0", "all masked"])
def test_no_rows(problem, empty):
    p = problem(4, 30, 5)
    rows = slice(0, 0) if empty == "T=0" else slice(None)
    hidden, weight = p.hidden[rows].clone().requires_grad_(), p.weight.requires_grad_()
    mask = torch.zeros(len(hidden), dtype=torch.bool)
    out = fused_linear_logprobs(hidden, weight, p.ids[rows], mask=mask, **ALL)
    loss = sum(x.sum() for x in out[:3])
    assert loss == 0
    loss.backward()
    assert (hidden.grad == 0).all() and hidden.grad.shape == hidden.shape
    assert (weight.grad == 0).all()
    logits = p.rand(4, 30)[rows].clone().requires_grad_()
    selective_logprobs(logits, p.ids[rows], mask=mask).logprobs.sum().backward()
    assert (logits.grad == 0).all()
    top = fused_linear_topk_logprobs(hidden.detach(), p.weight, 3, mask=mask)
    assert top.logprobs.shape == (len(hidden), 3)
    assert (top.logprobs == 0).all()


def test_extreme_logits():
    """Common offsets, spikes and suppressed tokens: no NaN, log-probs <= 0, digits kept."""
    g = torch.Generator().manual_seed(1)
    base = torch.randn(6, 50, generator=g)
    ids = torch.randint(0, 50, (6,), generator=g)
    for offset in (1e4, -1e4, -1e3):
        z = base + offset
        out = selective_logprobs(z, ids, **ALL)
        close(out, oracle(z.double(), ids), rtol=1e-6, atol=1e-6)
        linear = fused_linear_logprobs(torch.ones(6, 1), offset + base[0][:, None], ids, **ALL)
        close(linear, oracle((offset + base[0]).double().expand(6, 50), ids), rtol=1e-6, atol=1e-6)
    z = base.clone()
    z[:, ::3] = -torch.inf
    z[0] = -torch.inf
    z[0, 1] = -1e4
    z[1, 1] = 1e4
    ids = torch.tensor([1, 1, 3, 4, 5, 7])
    z.requires_grad_()
    out = selective_logprobs(z, ids, **ALL)
    close(out, oracle(z.detach().double(), ids), rtol=1e-5, atol=1e-6)
    assert out.logprobs[0] == 0 and out.logprobs[1] == 0 and out.logprobs[2] == -torch.inf
    (out.logprobs[[0, 1, 3, 4, 5]].sum() + out.entropy.sum()).backward()
    assert z.grad.isfinite().all()
    assert (z.grad[3:, ::3] == 0).all()
    dead = torch.full((2, 5), -torch.inf, requires_grad=True)
    out = selective_logprobs(dead, torch.tensor([0, 1]), **ALL)
    assert (
        (out.logprobs == -torch.inf).all()
        and (out.lse == -torch.inf).all()
        and (out.entropy == 0).all()
    )
    bias = torch.zeros(2500)
    bias[::2] = -torch.inf  # suppressed by the head itself, over two tiles
    hidden, weight = torch.randn(6, 3, generator=g), torch.randn(2500, 3, generator=g)
    hidden.requires_grad_()
    out = fused_linear_logprobs(hidden, weight, ids * 0 + 2499, bias=bias, **ALL)
    close(
        out,
        oracle((hidden @ weight.t() + bias).detach().double(), ids * 0 + 2499),
        rtol=1e-5,
        atol=1e-5,
    )
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_of_what_underflows_is_zero(dtype):
    # e^-87.34 and e^-708.40 are the smallest normal numbers.
    border = {torch.float32: -87.33, torch.float64: -708.39}[dtype]
    x = torch.linspace(2 * border, 0, 4096, dtype=dtype)
    x[0] = -torch.inf
    got, plain = exp(x), x.exp()
    assert torch.equal(got[x > border + 0.02], plain[x > border + 0.02])
    assert (got[x < border - 0.02] == 0).all()
    assert torch.equal(exp(x[3000:]), plain[3000:])
    assert exp(torch.tensor([-torch.inf, torch.nan])).isnan().tolist() == [False, True]
    assert exp(x, out=x) is x and torch.equal(x, got)


def test_true_class_gradient_keeps_its_digits():
    z = torch.tensor([[15.0, 0.0, 1.0]], requires_grad=True)
    selective_logprobs(z, torch.tensor([0])).logprobs.sum().backward()
    exact = torch.softmax(z.detach().double(), -1)
    torch.testing.assert_close(
        z.grad[0, 0].double(), exact[0, 1] + exact[0, 2], rtol=0, atol=1.2e-7
    )


def test_inplace_backward_writes_into_the_logits(problem):
    p = problem(6, 30, 5, torch.float32)
    z = p.rand(6, 30)
    ids, mask = p.ids.clamp(max=27), p.mask
    grads = []
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1.0
        out = selective_logprobs(
            logits,
            ids,
            mask=mask,
            valid_vocab_size=28,
            inplace_backward=inplace,
            return_entropy=True,
        )
        (out.logprobs.sum() + out.entropy.sum()).backward()
        grads.append(leaf.grad)
        assert torch.equal(logits.detach(), grads[-1] if inplace else z)
    assert torch.equal(*grads)


def test_row_stride_is_free(problem):
    p = problem(6, 30, 5, torch.float32)
    wide = p.rand(6, 64)
    assert torch.equal(
        selective_logprobs(wide[:, 4:34], p.ids).logprobs,
        selective_logprobs(wide[:, 4:34].contiguous(), p.ids).logprobs,
    )
    packed = torch.cat([p.hidden, p.hidden], 1)
    assert torch.equal(
        fused_linear_logprobs(packed[:, 5:], p.weight, p.ids).logprobs,
        fused_linear_logprobs(p.hidden, p.weight, p.ids).logprobs,
    )


def test_frozen_head_and_no_grad(problem):
    p = problem(6, 30, 5)
    hidden = p.hidden.requires_grad_()
    fused_linear_logprobs(hidden, p.weight, p.ids).logprobs.sum().backward()
    assert p.weight.grad is None
    weight = p.weight.requires_grad_()
    with torch.no_grad():
        assert not fused_linear_logprobs(hidden, weight, p.ids).logprobs.requires_grad
    fused_linear_logprobs(hidden.detach(), weight, p.ids).logprobs.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_a_weight_changed_before_the_backward_is_an_error(problem):
    p = problem(6, 30, 5)
    weight = p.weight.clone().requires_grad_()
    loss = fused_linear_logprobs(p.hidden.requires_grad_(), weight, p.ids).logprobs.sum()
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_does_not_round(problem):
    p = problem(6, 30, 5, torch.float32)
    expected = oracle(reference.head_logits(p.hidden, p.weight), p.ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_linear_logprobs(p.hidden, p.weight, p.ids, **ALL)
    close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("V", "k"), [(3, 3), (2100, 5), (2100, 2100), (4099, 100)])
def test_topk(problem, V, k):
    p = problem(70, V, 4)
    lp = torch.log_softmax(reference.head_logits(p.hidden, p.weight, temperature=1.5), -1)
    want, _ = lp.topk(k, dim=1)
    out = fused_linear_topk_logprobs(p.hidden, p.weight, k, temperature=1.5, mask=p.mask)
    torch.testing.assert_close(out.logprobs[p.mask], want[p.mask])
    torch.testing.assert_close(lp.gather(1, out.ids)[p.mask], want[p.mask])
    torch.testing.assert_close(out.tail_mass[p.mask], 1 - want.exp().sum(1)[p.mask])
    assert all(len(set(row)) == k for row in out.ids[p.mask].tolist())
    assert (out.tail_mass >= 0).all()
    assert (out.ids[~p.mask] == 0).all() and (out.logprobs[~p.mask] == 0).all()


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_scoring_never_holds_the_logits(problem):
    p = problem(512, 40_000, 4, torch.float32)
    with torch.no_grad(), _LargestTensor() as seen:
        fused_linear_logprobs(p.hidden, p.weight, p.ids, return_entropy=True)
    logits = 512 * 40_000 * 4
    assert seen.bytes <= max(p.weight.numel() * 4, 256 * 2048 * 4) < logits // 30
