"""The benchmark at tiny shapes on the CPU: what it prints, what it refuses, and what it never
invents."""

import json

import pytest
import torch

from benchmarks.kernels import peers
from benchmarks.kernels.__main__ import main
from benchmarks.kernels.oracle import truth_of
from benchmarks.kernels.problem import ENTROPY, Point, Problem

TINY = [
    "--device",
    "cpu",
    "--tokens",
    "24",
    "--hidden",
    "16",
    "--vocab",
    "300",
    "--dtype",
    "fp32",
    "--quick",
]


@pytest.fixture
def bench(tmp_path, capsys):
    """(arguments) -> (printed lines, JSON records), memory left out."""

    def run(*arguments):
        out = tmp_path / "out.jsonl"
        assert (
            main(
                [
                    *TINY,
                    "--no-memory",
                    "--peers-dir",
                    str(tmp_path / "peers"),
                    "--out",
                    str(out),
                    *arguments,
                ]
            )
            == 0
        )
        records = [json.loads(line) for line in out.read_text().splitlines()]
        return capsys.readouterr().out.splitlines(), records

    return run


def results(records, **wanted):
    found = [r for r in records if r["type"] == "result"]
    return [r for r in found if all(r[key] == value for key, value in wanted.items())]


def test_the_command_ends_with_the_table(run_command, tmp_path):
    out = tmp_path / "out.jsonl"
    done = run_command(
        "-m", "kernels.bench", *TINY, "--suite", "kl", "--peers", "torch", "--out", out
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    divergence = results(records, kernel="linear_divergence", provider="torch")[0]
    lines = done.stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert lines[-len(table) :] == table and len(table) == 2 + len(results(records))
    memory = [r for r in records if r["type"] == "memory"] + results(records)
    assert len([r for r in memory if r.get("temp_mib") is not None]) == len(results(records)), (
        memory
    )
    assert (
        divergence["ms_p20"] <= divergence["ms_p50"] <= divergence["ms_p80"]
        and divergence["ratio"] > 0
    )


def test_every_row_passes_the_gate(bench):
    _, records = bench("--peers", "torch")
    assert [r["type"] for r in records][:2] == ["environment", "ceilings"] and records[-1][
        "type"
    ] == "end"
    assert {r["status"] for r in results(records)} == {"ok"}
    assert len({(r["kernel"], r["mode"]) for r in results(records)}) == 11
    assert {r["mask"] for r in results(records, kernel="opd_one_shot")} == {0.0, 0.2}
    ours = results(records, provider="ours")
    assert {r["ratio"] for r in ours} == {1.0} and all(r["percent_of_floor"] > 0 for r in ours)


@pytest.mark.parametrize(
    "fault, shown", [("values", "err 1.0e-02"), ("gradient", "grad 5.0e-01"), ("nan", "err nan")]
)
def test_a_wrong_provider_gets_no_ratio(bench, monkeypatch, fault, shown):
    def wrong(hidden, weight, ids, mask):
        if fault == "gradient":
            half = weight.detach() + (weight - weight.detach()) / 2
            return peers.naive_logprobs(hidden, half, ids)
        right = peers.naive_logprobs(hidden, weight, ids)
        return right + 0.01 if fault == "values" else right * torch.nan

    monkeypatch.setitem(peers.LOADERS, "torch", lambda *_: {"logprobs": wrong})
    lines, records = bench("--suite", "head", "--peers", "torch")
    record = results(records, kernel="recompute", provider="torch")[0]
    assert record["status"] == "failed" and "ratio" not in record and "ms_p50" not in record
    line = next(line for line in lines if line.startswith("recompute") and "| torch" in line)
    assert "error above tolerance" in line and shown in line
    assert results(records, kernel="recompute", provider="ours")[0]["ratio"] == 1.0


def test_a_missing_peer_is_not_available(bench, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(peers.importlib.metadata, "distribution", _not_there)
    _, records = bench("--suite", "head", "--peers", "trl,cce", "--mask", "0")
    for name, why in (("trl", "trl 1.16.0 cannot be installed"), ("cce", "needs a CUDA device")):
        found = results(records, provider=name)
        assert found and all(
            r["status"] == "n/a" and why in r["reason"] and "ratio" not in r for r in found
        )


def _not_there(name):
    raise peers.importlib.metadata.PackageNotFoundError(name)


def test_a_provider_that_breaks_leaves_the_others(bench, monkeypatch):
    def breaks(*_):
        raise RuntimeError("out\nof memory")

    monkeypatch.setitem(peers.LOADERS, "torch", lambda *_: {"logprobs": breaks})
    _, records = bench("--suite", "head", "--peers", "torch", "--mask", "0")
    assert results(records, kernel="scoring", provider="torch")[0]["reason"] == "out of memory"
    assert results(records, kernel="scoring", provider="ours")[0]["status"] == "ok"


def test_without_time_every_row_is_in_the_table(bench):
    lines, records = bench("--suite", "kl", "--peers", "torch", "--budget-s", "0")
    assert {r["status"] for r in results(records)} == {"skipped"}
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(results(records))
    assert "skipped (time)" in lines[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--peers", "torch,nope"], "unknown peer 'nope'"),
        (["--suite", "nope"], "--suite"),
        (["--mask", "1"], "[0, 1)"),
        (["--mask", "-0.1"], "[0, 1)"),
        (["--tokens", "0"], "at least 1"),
        (["--dtype", "int8"], "--dtype"),
        (["--out", "/nowhere/out.jsonl"], "--out"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and words in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_an_absent_gpu_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert capsys.readouterr().err.count("\n") == 1


def test_inputs_are_peaked_and_do_not_depend_on_who_asks_first():
    a, b = (Problem(Point("cpu", "fp32", 64, 32, 1000)) for _ in range(2))
    ids, hidden, again, weight = a.ids, a.hidden, b.hidden, b.weight
    assert torch.equal(hidden, again) and torch.equal(ids, b.ids)
    lp = (again @ weight.t()).log_softmax(-1)
    assert -(lp.exp() * lp).sum(-1).mean().item() == pytest.approx(ENTROPY, abs=0.05)
    half = a.masked(0.5)
    assert half.active == 32 and half.hidden is a.hidden and a.mask is None


@pytest.mark.parametrize("kind", ["logprobs", "opd", "reverse_kl", "forward_kl"])
def test_the_oracle_agrees_with_autograd(kind):
    p = Problem(Point("cpu", "fp32", 24, 16, 300)).masked(0.25)
    if kind.endswith("kl"):
        p = p.masked(0.0)
    x, w = p.hidden.detach().double().requires_grad_(), p.weight.detach().double().requires_grad_()
    ls = (x @ w.t()).log_softmax(-1)
    if kind == "reverse_kl":
        lt = (p.teacher_hidden.double() @ p.teacher_weight.double().t()).log_softmax(-1)
        values, factor = (ls.exp() * (ls - lt)).sum(-1), 1 / p.T
    elif kind == "forward_kl":
        lt = (p.view_hidden.double() @ p.weight.detach().double().t()).log_softmax(-1)
        values, factor = (lt.exp() * (lt - ls)).sum(-1), 1 / p.T
    else:
        values, factor = ls.gather(1, p.ids[:, None]).squeeze(1), p.upstream.double()
        if kind == "opd":
            factor = (values.detach().exp() - p.teacher_logprobs.double().exp()) * p.mask / p.active
    dx, dw = torch.autograd.grad((values * factor).sum(), (x, w))
    truth = truth_of(p, kind)
    torch.testing.assert_close(truth.values, values)
    torch.testing.assert_close(truth.loss, (values * factor).sum())
    for grad, (at, want) in zip((dx, dw), truth.grads):
        torch.testing.assert_close(want, grad[at])


@pytest.mark.parametrize("kind", ["logprobs", "reverse_kl"])
def test_the_oracle_agrees_with_autograd_from_logits(kind):
    p = Problem(Point("cpu", "fp32", 100, 16, 300))
    z = p.logits.detach().double().requires_grad_()
    ls, lt = z.log_softmax(-1), p.teacher_logits.double().log_softmax(-1)
    loss = (
        (ls.gather(1, p.ids[:, None]).squeeze(1) * p.upstream).sum()
        if kind == "logprobs"
        else (ls.exp() * (ls - lt)).sum(-1).mean()
    )
    (dz,) = torch.autograd.grad(loss, z)
    truth = truth_of(p, f"logits {kind}")
    torch.testing.assert_close(truth.loss, loss)
    ((at, want),) = truth.grads
    assert len(at) < p.T
    torch.testing.assert_close(want, dz[at])
