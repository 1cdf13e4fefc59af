"""Every Triton kernel is compiled for three GPU generations, without a GPU: it fits the registers,
and neither T nor a parameter of the loss is a compile-time constant.

The launches are recorded from the public functions: what is compiled is what runs.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import kernels
from kernels import tiled_head

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    kernels.backend.interpreted(), reason="the interpreter does not compile"
)

V = 20_000
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


class Launch:
    """One launch as the compiler sees it: kernel, argument types, constants and alignment,
    options."""

    def __init__(self, fn, args, options):
        self.fn, self.options = fn, {k: options.pop(k) for k in ("num_warps",)}
        self.signature, self.constants, self.attrs = {}, {}, {}
        values = dict(zip(fn.arg_names, args)) | options
        for i, param in enumerate(fn.params):
            value = values[param.name]
            plain = isinstance(value, int) and not param.do_not_specialize
            if param.is_constexpr or value is None or (plain and value == 1):
                self.signature[param.name], self.constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                self.signature[param.name] = "*" + NAMES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    self.attrs[(i,)] = [["tt.divisibility", 16]]
            else:
                self.signature[param.name] = param.annotation_type or (
                    "i32" if value < 2**31 else "i64"
                )
                if plain and value % 16 == 0:
                    self.attrs[(i,)] = [["tt.divisibility", 16]]

    @property
    def key(self):
        return (
            self.fn.__name__,
            *map(str, (self.signature, self.constants, self.attrs, self.options)),
        )


@pytest.fixture
def record(monkeypatch):
    """(functions) -> the distinct launches they make, by key; nothing is computed."""

    def run(*functions):
        seen = {}
        # lets Triton take CPU tensors
        monkeypatch.setattr("kernels.backend.interpreted", lambda: True)
        monkeypatch.setitem(tiled_head.TILINGS, "cpu", tiled_head.TILINGS["cuda"]._replace(rows=2))

        def launch(self, *args, grid, warmup, **options):
            one = Launch(self, args, options)
            seen.setdefault(one.key, one)

        monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch)
        kernels.set_backend("triton")
        for function in functions:
            function()
        return seen

    return run


def tensors(T, dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return {
        "hidden": rand(T, 16).to(dtype).requires_grad_(),
        "weight": rand(V, 16).to(dtype).requires_grad_(),
        "logits": rand(T, V).to(dtype).requires_grad_(),
        "other": rand(T, V).to(dtype),
        "ids": torch.randint(0, V, (T,), generator=g),
        "advantages": rand(T),
        "lp": -rand(T).abs(),
        "mask": torch.arange(T) % 5 != 1,
    }


def losses(T, dtype=torch.float32, alpha=0.7, temperature=1.3, clip=0.2):
    """Everything that launches a kernel."""
    x = tensors(T, dtype)
    head = (x["hidden"], x["weight"], x["ids"])

    def opd(**options):
        kernels.fused_linear_opd_loss(
            *head, x["lp"], denominator=7, alpha=alpha, **options
        ).loss.backward()

    def divergence(**options):
        kernels.distillation_divergence(
            x["logits"],
            x["other"],
            denominator=7,
            mask=x["mask"],
            temperature=temperature,
            **options,
        ).loss.backward()

    def logits(**options):
        out = kernels.selective_logprobs(
            x["logits"], x["ids"], temperature=temperature, mask=x["mask"], **options
        )
        sum(value.sum() for value in out[:3] if value is not None).backward()

    def pg(**options):
        kernels.policy_gradient_loss(
            x["lp"].requires_grad_(),
            x["advantages"],
            denominator=7,
            clip_low=clip,
            mask=x["mask"],
            old_logprobs=x["lp"].detach(),
            **options,
        ).loss.backward()

    return [
        lambda: logits(),
        lambda: logits(return_entropy=True, return_lse=True),
        lambda: kernels.fused_linear_logprobs(*head, mask=x["mask"]).logprobs.sum().backward(),
        lambda: kernels.fused_linear_topk_logprobs(*head[:2], 5),
        lambda: opd(),
        lambda: opd(mask=x["mask"], normalization="none", entropy_coef=0.1),
        lambda: opd(reward="log_ratio", clip=2.0),
        lambda: opd(reward="log_ratio", tanh_scale=2.0),
        lambda: opd(
            objective="ppo_clip",
            dual_clip=3.0,
            old_logprobs=x["lp"],
            rollout_logprobs=x["lp"],
            is_cap=2.0,
        ),
        lambda: pg(objective="ppo_clip"),
        lambda: pg(objective="cispo"),
        lambda: pg(objective="reinforce"),
        lambda: kernels.power_reward(x["lp"], x["lp"], alpha, mask=x["mask"]),
        *(
            lambda name=name: divergence(divergence=name, alpha=alpha, beta=0.3)
            for name in ("reverse_kl", "forward_kl", "jsd", "power")
        ),
        lambda: kernels.fused_linear_distillation_divergence(
            x["hidden"], x["weight"], x["hidden"].detach(), x["weight"].detach(), denominator=7
        ).loss.backward(),
        lambda: kernels.fused_linear_self_distillation_kl(
            x["hidden"], x["hidden"], x["weight"], denominator=7, stop_grad="none"
        ).loss.backward(),
    ]


def usage(launch, capability, folder: Path) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of the compiled kernel, as the assembler reports
    them."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    source = triton.compiler.ASTSource(launch.fn, launch.signature, launch.constants, launch.attrs)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    path = folder / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
    text = subprocess.run(
        [
            get_ptxas(capability).path,
            "-v",
            "--regAllocOptLevel=2",
            f"-arch={arch}",
            path,
            "-o",
            folder / "kernel.cubin",
        ],  # as Triton calls it
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        "shared": compiled.metadata.shared,
    }


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(record, tmp_path, capability):
    found = record(*losses(6, torch.bfloat16)) | record(*losses(6))
    names = {launch.fn.__name__ for launch in found.values()}
    assert names == {
        "_fold_kernel",
        "_logprob_grad_kernel",
        "_tokens_kernel",
        "_sums_kernel",
        "_grad_kernel",
    }
    for key, launch in found.items():
        used = usage(launch, capability, tmp_path)
        assert used["registers"] > 0 and used["spilled"] == 0, (key, used)
        assert used["shared"] <= 48 * 1024, (key, used)


def test_no_recompilation(record):
    first = record(*losses(17))
    again = set()
    for T in (2, 3, 16, 33, 48, 64, 100, 128):
        again |= set(
            record(*losses(T, alpha=0.1 + T / 100, temperature=1 + T / 50, clip=0.01 * T % 1))
        )
    assert set(first) == again
