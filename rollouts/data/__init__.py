"""Data sets: files to rows, rows to examples, examples to prompts."""
