from __future__ import annotations

import pytest

from kd_helpers.course.exercises import attempt


def unsolved() -> int:
    raise NotImplementedError


def broken() -> int:
    return [][0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (unsolved, "Not solved yet: write your answer in the cell above and run both cells again."),
        (lambda: 41, "Not right yet: one more"),
        (broken, "Not right yet: your code raises IndexError: list index out of range"),
        (lambda: 42, "Correct."),
    ],
)
def test_every_answer_gets_a_reply(answer, said, capsys):
    def check(answer):
        assert answer() == 42, "one more"

    attempt(check, answer)
    assert capsys.readouterr().out.splitlines()[0].startswith(said)
