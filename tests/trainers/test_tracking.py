"""What a resumed run keeps of its records."""

import json

import pytest

from trainers.core.tracking import keep_through


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_records_with_unusual_line_ends_are_kept(tmp_path, mark):
    path = tmp_path / "completions.jsonl"
    rows = [{"step": step, "completion": f"one{mark}two"} for step in (1, 2, 3, 4)]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    keep_through(path, 3)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows[
        :3
    ]


def test_a_line_that_was_cut_off_goes_and_what_comes_after_it_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los\n{"step": 2}\n{"step": 3')
    keep_through(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
