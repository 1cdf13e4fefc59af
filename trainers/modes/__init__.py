"""How a run reads its sources: all at once, or while it writes.

A mode is one class that makes prompts, sampling, scores, metrics and the printed summary. Only the
mode that a run uses is imported.
"""

from __future__ import annotations

from trainers.modes.plain import Plain


def reading_mode(config) -> Plain:
    """The mode of a run: that of `streaming.layout`, plain where its method has no such key."""
    layout = getattr(getattr(config, "streaming", None), "layout", None)
    if layout is None:
        return Plain(config)
    if layout == "scheduled":
        from trainers.modes.simultaneous import Simultaneous

        return Simultaneous(config)
    from trainers.modes.streaming import Streaming

    return Streaming(config)
