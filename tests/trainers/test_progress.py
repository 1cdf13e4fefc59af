"""Progress of a long phase: lines with the time left where there is no terminal."""

from trainers.core import progress
from trainers.core.progress import Progress, clock


def test_lines_with_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("eval  step 0", 100, "completions") as shown:
        for seconds in range(1, 21):
            now[0] = float(seconds)
            shown.advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "eval  step 0  30 of 100 completions, 0:14 left",
        "eval  step 0  60 of 100 completions, 0:08 left",
        "eval  step 0  90 of 100 completions, 0:02 left",
    ]


def test_other_ranks_print_nothing(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("eval", 2, "completions", shown=False) as shown:
        now[0] = 60.0
        shown.advance()
    assert capsys.readouterr() == ("", "")


def test_a_clock():
    assert [clock(seconds) for seconds in (0, 9.9, 65, 3600)] == ["0:00", "0:09", "1:05", "60:00"]
