"""`python -m kernels.bench` runs `benchmarks.kernels` of the same checkout."""

import runpy

if __name__ == "__main__":
    runpy.run_module("benchmarks.kernels", run_name="__main__", alter_sys=True)
