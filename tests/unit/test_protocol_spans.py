"""Spans of slots against a plain set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.protocol import limits
from braniac.protocol.spans import Spans

SPANS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12)).map(lambda at: (at[0], sum(at))), max_size=60)


@given(SPANS)
def test_nothing_that_was_added_is_forgotten(added: list[tuple[int, int]]) -> None:
    spans, slots, crowded = Spans(), set(), False
    for first, last in added:
        spans = spans.adding(first, last)
        slots |= set(range(first, last + 1))
        crowded = crowded or len(spans.spans) == limits.SIGNED_SPANS_MAX
    held = {slot for slot in range(400) if slot in spans}
    assert held >= slots
    assert held == slots or crowded
    assert spans.last == max(slots, default=-1)
    assert Spans.from_text(spans.to_text()) == spans


def test_of_too_many_the_closest_two_become_one() -> None:
    spans = Spans()
    for at in range(limits.SIGNED_SPANS_MAX):
        spans = spans.adding(10 * at, 10 * at + 2)
    spans = spans.adding(57, 57)
    assert [slot for slot in range(50, 70) if slot in spans] == [50, 51, 52, 57, 58, 59, 60, 61, 62]


@pytest.mark.parametrize("text", ["x", "3-", "-3", "5-3", "3-5 4-9", "3-5  7-9", "03-5", "3-5 ", "1-2,4-5", "\u0663"])
def test_what_is_not_written_like_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Spans.from_text(text)
