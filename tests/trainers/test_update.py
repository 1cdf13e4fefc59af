"""The gradient of one step does not depend on how the work is split: ranks, micro-batches, order,
ZeRO stage.

float32; tolerance 2e-6 of the largest entry of each tensor (summation order differs), real
DeepSpeed, gloo."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "gradient_worker.py"
W = "token_mean"
ONE_RANK = [
    f"zero0/4096/given/{W}",
    f"zero0/100/given/{W}",
    f"zero0/100/reversed/{W}",
    f"zero1/100/given/{W}",
    f"zero2/100/given/{W}",
    f"zero3/100/given/{W}",
    f"zero2_offload/100/given/{W}",
    f"zero3_offload/100/given/{W}",
]
TWO_RANKS = [
    f"zero0/100/given/{W}",
    f"zero1/4096/reversed/{W}",
    f"zero2/100/given/{W}",
    f"zero3/70/given/{W}",
]


@pytest.fixture(scope="module")
def gradients(tiny_models, run_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(ROOT))
        compile_in_a_fourth_of_the_time(patched, tmp_path_factory.mktemp("compiler"))
        for ranks, settings in ((0, ONE_RANK), (2, TWO_RANKS)):
            done = run_command(WORKER, tiny_models["student"], out, *settings, ranks=ranks)
            assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: dict(np.load(path)) for path in out.glob("*.npz")}


def compile_in_a_fourth_of_the_time(patched, folder: Path) -> None:
    """Offloading compiles CPUAdam: here without debugging symbols, the headers of PyTorch's C++
    API and most optimisations, which the time goes into, and apart from what runs compile.

    Args:
        folder: for the compiler's stand-in, and what it compiles.
    """
    if "CXX" in os.environ:
        return
    compiler = folder / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ -DTORCH_INDUCTOR_CPP_WRAPPER "$@" -g0 -O1\n')
    compiler.chmod(0o755)
    patched.setenv("CXX", str(compiler))
    # PyTorch knows compilers by their names.
    patched.setenv("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    patched.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))


def name(setting: str, ranks: int) -> str:
    return f"{setting.replace('/', '_')}_{ranks}"


@pytest.mark.parametrize(
    "setting, ranks", [(s, 1) for s in ONE_RANK[1:]] + [(s, 2) for s in TWO_RANKS]
)
def test_the_gradient_is_the_same(gradients, setting, ranks):
    reference, other = gradients[name(ONE_RANK[0], 1)], gradients[name(setting, ranks)]
    assert reference.keys() == other.keys() and len(reference) > 10
    for tensor, expected in reference.items():
        scale = np.abs(expected).max()
        assert scale > 0, tensor
        np.testing.assert_allclose(
            other[tensor], expected, atol=2e-6 * scale + 1e-9, rtol=2e-5, err_msg=tensor
        )


def test_the_reported_norm_is_the_gradients_norm(gradients):
    for key, values in gradients.items():
        squares = sum(
            np.square(v.astype(np.float64)).sum()
            for n, v in values.items()
            if n not in ("norm", "loss")
        )
        assert float(values["norm"]) == pytest.approx(np.sqrt(squares), rel=1e-5), key


def test_a_models_dropout_does_not_change_the_gradient(
    gradients, tiny_models, run_command, tmp_path, monkeypatch
):
    model = shutil.copytree(tiny_models["student"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    setting = f"zero1/100/given/{W}"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_command(WORKER, model, tmp_path, setting)
    assert done.returncode == 0, done.stderr[-3000:]
    for tensor, values in np.load(tmp_path / f"{name(setting, 1)}.npz").items():
        np.testing.assert_array_equal(values, gradients[name(setting, 1)][tensor], tensor)
