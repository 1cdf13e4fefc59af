"""Side-by-side benchmark of the kernels and their peers: `python -m kernels.bench`."""
