"""What only a GPU can show: parity at full size, offsets beyond 2^31, run-to-run bits, memory, CUDA
graphs."""

import pytest
import torch

import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
V, H = 151_936, 1024


@pytest.fixture(autouse=True)
def triton_backend():
    kernels.set_backend("triton")
    yield
    kernels.set_backend("auto")


def problem(T, dtype=torch.bfloat16):
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(T, H, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(V, H, generator=g, device="cuda") * 0.1).to(dtype)
    return hidden, weight, torch.randint(0, V, (T,), generator=g, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scoring_at_full_vocabulary(dtype):
    hidden, weight, ids = problem(2048, dtype)
    got = kernels.fused_linear_logprobs(hidden, weight, ids, return_entropy=True)
    at = torch.arange(0, 2048, 32, device="cuda")
    lp = torch.log_softmax(hidden[at].double() @ weight.double().t(), 1)
    torch.testing.assert_close(
        got.logprobs[at].double(), lp.gather(1, ids[at, None])[:, 0], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        got.entropy[at].double(), -(lp.exp() * lp).sum(1), rtol=1e-4, atol=1e-4
    )
    # Tensor cores cut off what they add: of 1,024 products up to about 2e-5 of a logit near 10.
    error = (got.logprobs[at].double() - lp.gather(1, ids[at, None])[:, 0]).abs()
    assert error.quantile(0.99) <= 5e-5


def test_one_shot_gradient_at_full_vocabulary():
    hidden, weight, ids = problem(512)
    teacher = -torch.rand(512, device="cuda")
    grads = []
    for convert in (torch.Tensor.bfloat16, torch.Tensor.double):
        h, w = (convert(x).clone().requires_grad_() for x in (hidden, weight))
        kernels.set_backend("triton" if convert is torch.Tensor.bfloat16 else "torch")
        kernels.fused_linear_opd_loss(h, w, ids, teacher, denominator=512).loss.backward()
        grads.append((h.grad.double(), w.grad.double()))
    for got, want in zip(*grads):
        assert (got - want).norm() / want.norm() < 1e-2


def test_bits_do_not_depend_on_the_split_or_the_run():
    hidden, weight, ids = problem(3000)
    whole = kernels.fused_linear_logprobs(hidden, weight, ids).logprobs
    assert torch.equal(whole, kernels.fused_linear_logprobs(hidden, weight, ids).logprobs)
    for cut in (1, 1024, 1777):
        parts = [
            kernels.fused_linear_logprobs(hidden[at], weight, ids[at]).logprobs
            for at in (slice(0, cut), slice(cut, None))
        ]
        assert torch.equal(whole, torch.cat(parts))


def test_more_logits_than_32_bits_count():
    T = 16_384
    logits = torch.randn(T, V, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, V, (T,), device="cuda")
    got = kernels.selective_logprobs(logits, ids).logprobs[-64:]
    want = torch.log_softmax(logits[-64:].double(), 1).gather(1, ids[-64:, None])[:, 0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_memory_of_scoring_and_of_one_shot():
    hidden, weight, ids = problem(8192)

    def extra(function):
        # The first call also takes cuBLAS's workspace, of 32 MiB on Hopper, which stays.
        function()
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    with torch.no_grad():
        assert extra(lambda: kernels.fused_linear_logprobs(hidden, weight, ids)) <= 64
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    # dX, dW in float32 and once more as the parameter's dtype
    gradients = (H * 8192 * 2 + H * V * (4 + 2)) / 2**20
    assert (
        extra(
            lambda: kernels.fused_linear_opd_loss(
                h, w, ids, -torch.rand(8192, device="cuda"), denominator=8192
            ).loss.backward()
        )
        <= gradients + 1.3 * 1024
    )


def test_cuda_graph():
    z = torch.randn(64, V, device="cuda")
    ids = torch.randint(0, V, (64,), device="cuda")
    eager = kernels.selective_logprobs(z, ids).logprobs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernels.selective_logprobs(z, ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.selective_logprobs(z, ids).logprobs
    graph.replay()
    assert torch.equal(eager, captured)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one():
    hidden, weight, ids = (x.to("cuda:1") for x in problem(64))
    here = kernels.fused_linear_logprobs(*(x.to("cuda:0") for x in (hidden, weight, ids)))
    there = kernels.fused_linear_logprobs(hidden, weight, ids)
    torch.testing.assert_close(there.logprobs.cpu(), here.logprobs.cpu())


def test_nan_reaches_the_reward():
    teacher = torch.tensor([torch.nan, -1.0], device="cuda")
    reward = kernels.power_reward(teacher, torch.full_like(teacher, -2.0), 1.0)
    assert reward.isnan().tolist() == [True, False]


def test_ids_outside_the_vocabulary():
    hidden, weight, ids = problem(8)
    ids[3] = V + 7
    with pytest.raises(IndexError, match="token_ids must lie in"):
        kernels.fused_linear_logprobs(hidden, weight, ids)
