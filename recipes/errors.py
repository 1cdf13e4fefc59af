"""The exceptions a user is meant to read: each message is one line that says what, where and what
to do."""


def one_line(error: Exception, limit: int = 300) -> str:
    """An error's message as the end of a line: no line breaks, no final stop, cut at `limit`."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message.rstrip(".")[:limit]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OnstreamError(Exception):
    """Base of every error that `train.py` and the scripts print as one line, without a
    traceback.

    What a message quotes may hold line breaks and other signs that move a terminal's cursor. They
    are written as Python writes them in a text.
    """

    def __init__(self, message: str = ""):
        super().__init__("".join(map(_visible, message)))


def _visible(letter: str) -> str:
    return letter if letter.isprintable() else repr(letter)[1:-1]


class ConfigError(OnstreamError):
    """A key, its type or its value is wrong; the message names the key."""


class DataError(OnstreamError):
    """A data file, or a row of it, cannot be used; the message names the file and the row."""


class ModelError(OnstreamError):
    """A model folder cannot be used: missing, unreadable, or of another vocabulary; the message
    names it."""


class TeacherError(OnstreamError):
    """A served teacher does not answer, or answers what cannot be its log-probs; the message names
    its URL."""


class SyncError(OnstreamError):
    """The rollout engine's weights differ from the trainer's; the message names the tensor."""


class CheckpointError(OnstreamError):
    """A checkpoint cannot be saved or resumed; the message names the file."""


class TrainingError(OnstreamError):
    """A run stops before it does harm: updates or weights are not finite; the message names the
    step."""


class AnnotationError(OnstreamError):
    """A trainer writes an annotation that no loss reads, or one of another dtype or length; or an
    engine gives a trajectory with such an array."""
