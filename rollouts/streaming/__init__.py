"""Streaming reasoning: a source is read sentence by sentence, with a thought after each."""
