"""The training loop, the DeepSpeed engine, the three loss primitives, and one file per method."""
