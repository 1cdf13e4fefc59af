import math

import pytest
import torch

from kernels import log_ratio_reward, power_reward


def log(*p):
    return torch.tensor(p, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("alpha", "reward"), [(1, 0.4), (5, 0.55924), (10, 0.34770), (50, 5.1538e-3)]
)
def test_test_vectors_of_the_paper(alpha, reward):
    for dtype in (torch.float32, torch.float64):
        p, q = log(0.9).to(dtype), log(0.5).to(dtype)
        assert power_reward(p, q, alpha, normalization="none").item() == pytest.approx(
            reward, rel=1e-4
        )
        assert power_reward(q, p, alpha, normalization="none").item() == pytest.approx(
            -reward, rel=1e-4
        )
        assert power_reward(p, q, alpha).item() == pytest.approx(reward / alpha, rel=1e-4)


def test_small_alpha_is_the_log_ratio():
    p, q = -torch.rand(1000, dtype=torch.float64) * 8, -torch.rand(1000, dtype=torch.float64) * 8
    d = log_ratio_reward(p, q)
    torch.testing.assert_close(d, p - q, rtol=0, atol=0)
    assert torch.equal(power_reward(p, q, 0.0), d)
    for alpha in (1e-9, 1e-4, 1e-2):
        # r = d (1 - alpha |d| / 2 + ...) e^(alpha m), and |m| <= 8
        assert (
            (power_reward(p, q, alpha) - d).abs() <= alpha * (d.square() + 8 * d.abs()) + 1e-15
        ).all()


def test_near_equal_pairs_keep_sign_and_digits_in_float32():
    """400k pairs, gaps down to 1e-8, alpha from 1e-8 to 20, against float64 with expm1."""
    g = torch.Generator().manual_seed(0)
    n = 50_000
    q = -torch.rand(n, generator=g) * 12
    p = (q + (10 ** (-8 * torch.rand(n, generator=g))) * torch.randn(n, generator=g)).clamp_max(0)
    for alpha in (1e-8, 1e-6, 1e-3, 1e-2, 0.1, 1.0, 5.0, 20.0):
        reward = power_reward(p, q, alpha)
        P, Q = p.double(), q.double()
        top, gap = torch.maximum(P, Q), (P - Q).abs()
        exact = (P - Q).sign() * torch.exp(alpha * top) * -torch.expm1(-alpha * gap) / alpha
        assert (reward.double() * (P - Q) >= 0).all(), alpha
        normal = exact.abs() > 1e-36  # below, float32 underflows
        assert (reward[P == Q] == 0).all()
        assert (reward[normal] != 0).all(), alpha
        error = (reward.double() - exact)[normal].abs() / exact[normal].abs()
        assert error.max() <= 1e-5, (alpha, error.max())
        assert (reward[~normal].abs() < 1e-35).all()


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.5, 5.0, 500.0])
def test_edges(alpha):
    inf = math.inf
    p = torch.tensor([-inf, -inf, -1.0, 1e-7, 0.0, -1e-30, -400.0])
    q = torch.tensor([-1.0, -inf, -inf, 0.0, 1e-7, -1e-30, -1.0])
    r = power_reward(p, q, alpha)
    assert not r.isnan().any()
    assert (r[1] == 0) & (r[3] == 0) & (r[4] == 0) & (r[5] == 0)
    if alpha:
        assert r[0].item() == pytest.approx(-math.exp(-alpha) / alpha)
        assert r[2].item() == pytest.approx(math.exp(-alpha) / alpha)
        assert r.abs().max() <= 1 / alpha
        assert power_reward(p, q, alpha, normalization="none").abs().max() <= 1
    else:
        assert r[0] == -inf
        assert r[2] == inf
    assert r[6] < 0 or alpha == 500


def test_log_ratio_bounds():
    p, q = torch.tensor([-5.0, -1.0, -torch.inf]), torch.tensor([-1.0, -1.5, -2.0])
    assert log_ratio_reward(p, q, clip=1.0).tolist() == [-1.0, 0.5, -1.0]
    torch.testing.assert_close(
        log_ratio_reward(p, q, tanh_scale=5.0), torch.tanh(torch.tensor([-0.8, 0.1, -torch.inf]))
    )
    assert log_ratio_reward(p, q)[2] == -torch.inf


def test_mask_detach_and_dtype():
    p = torch.tensor([-1.0, torch.nan, -3.0], requires_grad=True)
    q = torch.tensor([-2.0, torch.inf, -1.0], requires_grad=True)
    mask = torch.tensor([1, 0, 1], dtype=torch.uint8)
    for r in (power_reward(p, q, 2.0, mask=mask), log_ratio_reward(p, q, mask=mask)):
        assert not r.requires_grad
        assert r[1] == 0
        assert r[0] > 0 > r[2]
    assert power_reward(p.bfloat16(), q.bfloat16(), 1.0, mask=mask).dtype == torch.float32
    assert power_reward(p.double(), q, 1.0, mask=mask).dtype == torch.float64
    assert power_reward(p[:0], q[:0], 1.0).shape == (0,)
