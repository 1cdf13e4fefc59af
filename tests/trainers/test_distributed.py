"""The process group, and what other libraries keep of it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AGAIN = """
import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups
from trainers.core import distributed, operators

operators.disable_unused()
for _ in range(2):
    distributed.setup()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print(groups._get_broadcast_src_rank())
    dist.destroy_process_group()
"""


def test_a_process_group_can_be_made_again():
    """DeepSpeed kept the groups of the one that was gone, and refused the next model."""
    done = subprocess.run(
        [sys.executable, "-c", AGAIN], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ["0", "0"]
