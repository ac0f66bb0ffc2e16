"""What the exercise cells of the notebooks use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def attempt(check: Callable[[Any], None], answer: Any) -> None:
    """Run an exercise's check on a reader's answer and say how it went, without stopping the notebook.

    Args:
        check: raises AssertionError, with a hint as its message, when the answer is wrong.
        answer: what the reader wrote; raises NotImplementedError as long as nothing is written.
    """
    try:
        check(answer)
    except NotImplementedError:
        print("Not solved yet: write your answer in the cell above and run both cells again.")
    except AssertionError as error:
        print(f"Not right yet: {error}")
    except Exception as error:
        print(f"Not right yet: your code raises {type(error).__name__}: {error}")
    else:
        print("Correct.")
