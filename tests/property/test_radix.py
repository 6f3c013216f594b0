"""The radix tree against brute force: a plain list of (holder, tokens) answers every question the slow way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pasture.core.values import Namespace
from pasture.kv.radix import RadixTree, common_prefix, token_array

NAMES = st.sampled_from([Namespace("a"), Namespace("b")])
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=10)
"""three token values and short paths, so that prefixes meet all the time"""


def shared(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)), st.integers(0, 4), st.integers(0, 4))
def test_common_prefix_counts_equal_tokens(a: list[int], b: list[int], a0: int, b0: int) -> None:
    assert common_prefix(token_array(a), a0, token_array(b), b0) == shared(a[a0:], b[b0:])


@given(st.lists(st.tuples(NAMES, PATHS)), NAMES, PATHS, st.sets(st.integers(0, 20)))
def test_longest_prefix_and_size_are_those_of_the_held_paths(
    paths: list[tuple[Namespace, list[int]]], asked_in: Namespace, asked: list[int], leavers: set[int]
) -> None:
    tree: RadixTree[int] = RadixTree()
    ends = [tree.insert(name, token_array(path), holder) for holder, (name, path) in enumerate(paths)]
    for holder in leavers & set(range(len(paths))):
        tree.leave(ends[holder], holder)
    tree.check()
    stay = [(name, path) for holder, (name, path) in enumerate(paths) if holder not in leavers]
    prefixes = {(name, tuple(path[:n])) for name, path in stay for n in range(1, len(path) + 1)}
    assert tree.n_tokens == len(prefixes)
    match = tree.match(asked_in, token_array(asked))
    assert match.length == max((shared(path, asked) for name, path in stay if name == asked_in), default=0)


@given(st.lists(PATHS, min_size=1, max_size=8), st.data())
def test_cut_ends_a_node_where_the_match_ends_and_keeps_every_path(paths: list[list[int]], data: st.DataObject) -> None:
    tree: RadixTree[int] = RadixTree()
    name = Namespace("n")
    ends = [tree.insert(name, token_array(path), holder) for holder, path in enumerate(paths)]
    asked = data.draw(PATHS)
    match = tree.match(name, token_array(asked))
    node = tree.cut(match)
    tree.check()
    assert list(node.path_tokens()) == asked[: match.length]
    assert [list(end.path_tokens()) for end in ends] == paths
    assert node.parent is None or node.holders == {i for i, path in enumerate(paths) if shared(path, asked) >= match.length}
