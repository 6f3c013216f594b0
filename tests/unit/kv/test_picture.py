"""The pool's prefix tree as the statistics show it: who shares what, bounded, under names that last."""

from __future__ import annotations

from pasture.core.statistics import MAX_PREFIXES
from pasture.kv.radix import token_array
from tests.unit.kv.test_pool import PROMPT, make, run


def test_a_shared_beginning_is_one_prefix_with_two_that_go_on() -> None:
    pool = make()
    run(pool, PROMPT)
    (alone,) = pool.statistics().prefixes
    assert (alone.parent, alone.start, alone.n_tokens, alone.holders) == (None, 0, 100, 1)
    run(pool, PROMPT[:60] + token_array([7, 8, 9]))
    shared, *rest = pool.statistics().prefixes
    assert (shared.number, shared.n_tokens, shared.holders, shared.running) == (alone.number, 60, 2, 2), (
        "the beginning keeps its name"
    )
    assert {(prefix.parent, prefix.start, prefix.n_tokens) for prefix in rest} == {
        (shared.number, 60, 40),
        (shared.number, 60, 3),
    }
    assert shared.tokens == token_array(range(60))
    assert [shared.hits, *(prefix.hits for prefix in rest)] == [1, 0, 0], "the second request found the beginning"


def test_a_sequence_names_the_prefix_in_which_it_ends() -> None:
    pool = make()
    run(pool, PROMPT)
    run(pool, PROMPT[:60] + token_array([7, 8, 9]))
    statistics = pool.statistics()
    ends = {prefix.number: prefix.start + prefix.n_tokens for prefix in statistics.prefixes}
    assert [ends[s.prefix] for s in statistics.sequences if s.prefix is not None] == [100, 63]


def test_a_large_tree_is_cut_to_what_weighs_most_and_stays_a_tree() -> None:
    pool = make(n_cells=100_000, n_seqs=256)
    for i in range(256):
        run(pool, token_array([*range(50), *([1000 + i] * (1 + i))]), f"r{i}")
    prefixes = pool.statistics().prefixes
    assert len(prefixes) == MAX_PREFIXES
    seen: set[int | None] = {None}
    for prefix in prefixes:
        assert prefix.parent in seen
        seen.add(prefix.number)
    assert min(prefix.n_tokens for prefix in prefixes) >= 50, "the lightest were left out"


def test_what_people_wrote_is_not_in_a_prefixs_repr() -> None:
    pool = make()
    run(pool, token_array([123456, 654321]))
    assert "123456" not in repr(pool.statistics().prefixes)
