"""The optimizer's state in a checkpoint: exact with the same ranks and ZeRO stage, read with
others, and never code."""

import json
import os
import pickle
from pathlib import Path

import pytest
from safetensors import safe_open

from recipes.errors import CheckpointError
from trainers.core import random_states, state
from trainers.core.files import checksums

WORKER = Path(__file__).with_name("state_worker.py")
STAGES = [f"zero{stage}" for stage in range(4)] + [f"zero{stage}/bfloat16" for stage in (1, 2, 3)]
ALONE = ["zero0", "zero2", "zero3", "zero1/bfloat16"]
# Saved by two ranks, read by one.
OTHERS = ["zero0<zero1_2", "zero1<zero1_2", "zero3<zero1_2", "zero2<zero3_2", "zero1<zero0_2"]
OTHERS += ["zero2/bfloat16<zero3_bfloat16_2"]


@pytest.fixture(scope="module")
def updates(tiny_models, run_command, tmp_path_factory):
    """What the worker printed on two ranks and on one, by number of ranks and job; its folder."""
    folder = tmp_path_factory.mktemp("states")
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(WORKER.parents[2]))
        for ranks, jobs in ((2, STAGES), (1, [*ALONE, *OTHERS])):
            done = run_command(
                WORKER, tiny_models["student"], folder, *jobs, ranks=ranks if ranks > 1 else 0
            )
            assert done.returncode == 0, done.stderr[-3000:]
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            found |= {(ranks, row["job"]): row for row in map(json.loads, lines)}
    return found, folder


@pytest.mark.parametrize("ranks, stages", [(1, ALONE), (2, STAGES)])
def test_the_update_after_a_load_is_that_of_the_whole_run(updates, ranks, stages):
    for stage in stages:
        row = updates[0][ranks, stage]
        assert row["equal"] and row["resumed"] == row["whole"], row


def test_another_number_of_ranks_or_stage_goes_on(updates):
    """It was refused."""
    for job in OTHERS:
        form, _, source = job.partition("<")
        row = updates[0][1, job]
        saver = source.removesuffix("_2").replace("_", "/")
        whole = updates[0][2, saver]
        tolerance = 1e-2 if "bfloat16" in form else 1e-6
        assert row["resumed"] == pytest.approx(whole["whole"], rel=tolerance), row
        assert row["sum"] == pytest.approx(whole["sum"], rel=tolerance), row


def test_each_element_is_written_once(updates):
    """By the rank that has it; where all have it, the ranks share the writing."""
    for stage in ("zero0_2", "zero1_2", "zero3_2"):
        keys, sizes = [], {0: 0, 1: 0}
        for path in (updates[1] / stage).iterdir():
            with safe_open(path, framework="pt") as file:
                keys += file.keys()
                for key in file.keys():  # noqa: SIM118
                    sizes[int(path.stem.split("_")[1])] += file.get_tensor(key).numel()
        assert len(set(keys)) == len(keys)
        assert min(sizes.values()) > 0.2 * sum(sizes.values()), (stage, sizes)


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_a_checkpoint_runs_nothing(tmp_path):
    """DeepSpeed's files and the random states were unpickled."""
    for name in ("rank_0_0.safetensors", "random_0.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    for read in (state.Saved, random_states.load):
        with pytest.raises(CheckpointError, match=r"(rank|random)_0\S+ cannot be read") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_checksums_of_files_are_those_of_their_content(tmp_path):
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        path.write_text(f"{number % 10}")
    found = checksums(paths)
    assert found[:10] == found[10:] and len({digest for _, digest in found}) == 10


def test_other_random_numbers_come_back(tmp_path):
    import random

    import numpy as np
    import torch

    def drawn():
        return random.random(), np.random.normal(), float(torch.rand(1))

    random_states.seed(3)
    np.random.normal()  # leaves the second of a pair
    random.gauss(0, 1)
    random_states.save(tmp_path)
    first, gauss = drawn(), random.gauss(0, 1)
    random_states.seed(4)
    assert drawn() != first
    random_states.load(tmp_path)
    assert drawn() == first and random.gauss(0, 1) == gauss
