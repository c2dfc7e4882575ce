"""Prompt lookup: the index is incremental and proposes what really followed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ridgeline.speculate.ngram import BRANCHES, LONGEST, SHORTEST, SuffixIndex


@given(st.lists(st.integers(0, 2), max_size=60), st.data())
def test_an_index_that_grows_is_one_made_at_once(tokens: list[int], data: st.DataObject) -> None:
    at_once, grown = SuffixIndex(), SuffixIndex()
    at_once.extend(tokens)
    at = 0
    while at < len(tokens):
        at = data.draw(st.integers(at + 1, len(tokens)))
        grown.extend(tokens[:at])
    assert grown._ends == at_once._ends
    matches = at_once.matches(tokens)
    assert len(matches) <= BRANCHES
    assert [length for length, _ in matches] == sorted((length for length, _ in matches), reverse=True)
    for length, place in matches:
        assert SHORTEST <= length <= LONGEST
        assert tokens[place - length : place] == tokens[len(tokens) - length :]
        assert place < len(tokens)
    if not matches:
        last = tokens[-SHORTEST:]
        assert all(tokens[i : i + SHORTEST] != last for i in range(len(tokens) - SHORTEST))


def test_a_draft_is_what_followed_latest_first() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3]
    sketch = SuffixIndex().draft(tokens, 3)
    tree, _ = sketch.tree()
    assert {tuple(tree.path_tokens(node)) for node in range(len(tree))} == {
        (5,), (5, 9), (5, 9, 1), (4,), (4, 9), (4, 9, 1),
    }  # fmt: skip
    assert tree.tokens[0] == 5


def test_nothing_known_drafts_nothing() -> None:
    assert len(SuffixIndex().draft([1, 2, 3, 4], 3)) == 0
    assert len(SuffixIndex().draft([], 3)) == 0
