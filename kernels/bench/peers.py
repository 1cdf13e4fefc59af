"""The old place of `benchmarks.kernels.peers`, until its importers know the new one."""

from benchmarks.kernels.peers import *  # noqa: F403
