"""The old place of `benchmarks.kernels.memory`, until its importers know the new one."""

from benchmarks.kernels.memory import *  # noqa: F403
