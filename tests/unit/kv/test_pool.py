"""The pool's promises one by one; the random machine in tests/stateful combines them."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from pasture.core.errors import InvariantBroken
from pasture.core.values import (
    Compact,
    Copy,
    Layout,
    Namespace,
    PoolShape,
    Release,
    Remove,
    RequestId,
    Restore,
    Save,
    SeqId,
    Share,
)
from pasture.engine.fake import FakeSlab
from pasture.kv.eviction import largest_first
from pasture.kv.pool import Pool
from pasture.kv.radix import token_array
from pasture.kv.sequence import Sequence

A, B = Namespace("a"), Namespace("b")
PROMPT = token_array(range(100))


class Ticks:
    """A clock that moves by one whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def make(
    n_cells: int = 1000, n_seqs: int = 8, layout: Layout = Layout.UNIFIED, *, share: bool = True, shareable: bool = True
) -> Pool:
    return Pool(PoolShape(n_cells, n_seqs, layout), clock=Ticks(), share=share, shareable=shareable)


def run(pool: Pool, tokens: array[int], name: str = "r", namespace: Namespace = A) -> Sequence:
    """A request that computes all of `tokens`."""
    sequence = pool.join(namespace, tokens, RequestId(name))
    assert sequence is not None
    pool.extend(sequence, tokens[sequence.length :])
    pool.check()
    return sequence


def test_a_prompt_joins_a_running_sequence_token_by_token() -> None:
    pool = make()
    donor = run(pool, PROMPT)
    pool.operations()
    joined = pool.join(A, PROMPT[:63] + token_array([999, 998]), RequestId("s"))
    assert joined is not None
    assert joined.length == 63
    assert pool.operations() == (Copy(donor.id, joined.id, 0, 63),)
    assert pool.used_cells == 100
    assert list(donor.tokens()) == list(PROMPT)
    pool.check()


def interleaved(pool: Pool, n_tokens: int) -> tuple[Sequence, Sequence]:
    """Two conversations with the prompt in common, whose replies were written token by token in turn."""
    one, two = run(pool, PROMPT, "one"), run(pool, PROMPT, "two")
    for i in range(n_tokens):
        pool.extend(one, token_array([1000 + i]))
        pool.extend(two, token_array([2000 + i]))
    pool.operations()
    return one, two


def tiled_pool(n_cells: int = 1000) -> Pool:
    return Pool(PoolShape(n_cells, 8, tile_tokens=64, can_pad=True), clock=Ticks())


def test_a_reply_written_between_others_is_brought_together_when_it_ends() -> None:
    pool = tiled_pool()
    one, two = interleaved(pool, 20)
    assert pool.fragmentation > 0.2
    pool.finish(one)
    pool.finish(two)
    assert pool.operations() == (Compact(one.id, 100, 120), Compact(two.id, 100, 120))
    assert pool.fragmentation < 0.02
    again = run(pool, one.tokens() + token_array([7]))
    pool.finish(again)
    assert pool.operations() == (), "it is in one piece"


def test_cells_that_a_move_left_stay_taken_until_they_are_needed() -> None:
    pool = tiled_pool(n_cells=200)
    one, two = interleaved(pool, 20)
    pool.finish(one)
    assert (pool.used_cells, pool.placement.left_cells, pool.free_cells) == (140, 20, 40)
    pool.operations()
    pool.check()
    assert pool.make_room(40)
    assert pool.operations() == ()
    assert pool.make_room(41)
    assert pool.operations() == (Release(),)
    assert (pool.placement.left_cells, pool.free_cells) == (0, 60)
    pool.finish(two)
    assert pool.placement.left_cells == 20


def test_what_moves_left_is_freed_when_it_is_much() -> None:
    pool = tiled_pool()
    sequences = interleaved(pool, 90)
    for sequence in sequences:
        pool.finish(sequence)
    assert pool.operations() == (*(Compact(sequence.id, 100, 190) for sequence in sequences), Release())
    assert pool.placement.left_cells == 0


def test_a_rebuilt_cache_has_nothing_left_over() -> None:
    pool = tiled_pool()
    pool.finish(interleaved(pool, 20)[0])
    pool.operations()
    pool.rebuilt(pool.shape)
    assert pool.free_cells == pool.shape.n_cells - pool.used_cells


@pytest.mark.parametrize("n_tokens", [1, 8])
def test_a_short_reply_is_not_worth_moving(n_tokens: int) -> None:
    pool = tiled_pool()
    pool.finish(interleaved(pool, n_tokens)[0])
    assert pool.operations() == ()


def test_a_reply_is_left_where_it_is_without_tiles_without_room_and_where_others_hold_it() -> None:
    plain = make()
    plain.finish(interleaved(plain, 20)[0])
    assert plain.operations() == ()
    full = tiled_pool(150)
    full.finish(interleaved(full, 20)[0])
    assert full.operations() == ()
    shared = tiled_pool()
    one, _ = interleaved(shared, 20)
    run(shared, one.tokens() + token_array([5, 6]), "fork")
    shared.operations()
    shared.extend(one, token_array([9]))
    shared.finish(one)
    assert not any(isinstance(operation, Compact) for operation in shared.operations())


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    pool = make()
    run(pool, PROMPT)
    assert pool.lookup(A, PROMPT) == 99


def test_nothing_is_found_across_namespaces() -> None:
    pool = make()
    run(pool, PROMPT)
    assert pool.lookup(B, PROMPT) == 0
    run(pool, PROMPT, namespace=B)
    assert pool.used_cells == 200


def test_an_idle_conversation_is_taken_over_without_an_operation() -> None:
    pool = make()
    first = run(pool, PROMPT)
    pool.finish(first)
    again = pool.join(A, PROMPT + token_array([7, 8]), RequestId("s"))
    assert again is first
    assert pool.operations() == ()
    assert pool.hit_tokens == {"idle": 100}


def test_equal_tokens_computed_twice_are_kept_once() -> None:
    pool = make()
    one, two = run(pool, token_array([1, 2])), run(pool, token_array([1, 3]))
    for sequence, tokens in ((one, [5, 6, 7]), (two, [9])):
        pool.extend(sequence, token_array(tokens))
    three = pool.join(A, token_array([1, 2, 99]), RequestId("three"))
    assert three is not None
    assert three.length == 2
    pool.operations()
    pool.extend(three, token_array([5, 6, 8]))
    assert pool.operations() == (Share(one.id, three.id, 2, 4),)
    assert pool.used_cells == 8
    pool.check()


def test_eviction_takes_idle_leaves_oldest_first_and_never_a_running_cell() -> None:
    pool = make(n_cells=300)
    old, new = run(pool, PROMPT), run(pool, token_array(range(200, 300)))
    pool.finish(old)
    pool.finish(new)
    running = run(pool, token_array(range(400, 480)))
    pool.operations()
    assert pool.make_room(60)
    assert pool.operations() == (Remove(old.id, 36, None),)
    assert pool.make_room(220)
    assert not pool.make_room(221)
    assert list(pool.sequences.values()) == [running]
    assert pool.evicted_cells["cells"] == 200
    pool.check()


def test_the_head_of_a_shared_prefix_outlives_its_tails() -> None:
    pool = make(n_cells=200)
    for tail in (501, 502):
        pool.finish(run(pool, PROMPT[:50] + token_array([tail] * 40)))
    assert pool.make_room(100)
    assert pool.lookup(A, PROMPT[:51]) == 50


def test_the_policy_is_a_function() -> None:
    pool = Pool(PoolShape(300, 8), clock=Ticks(), policy=largest_first)
    small = run(pool, token_array([1, 2, 3]))
    large = run(pool, PROMPT)
    pool.finish(small)
    pool.finish(large)
    assert pool.make_room(250)
    assert small.length == 3
    assert large.length < 100


def test_sequence_ids_come_from_idle_sequences_and_then_not_at_all() -> None:
    pool = make(n_seqs=2)
    pool.finish(run(pool, token_array([1, 2])))
    run(pool, token_array([3, 4]))
    run(pool, token_array([5, 6]))
    assert pool.evicted_cells["sequences"] == 2
    assert pool.join(A, token_array([7, 8]), RequestId("x")) is None


def test_the_only_idle_sequence_gives_its_tail_and_goes_on_from_the_common_prefix() -> None:
    pool = make(n_seqs=1)
    only = run(pool, PROMPT)
    pool.finish(only)
    pool.operations()
    joined = pool.join(A, PROMPT[:30] + token_array([900]), RequestId("s"))
    assert joined is only
    assert joined.length == 30
    assert pool.operations() == (Remove(only.id, 30, None),)
    assert pool.used_cells == 30
    pool.check()


def test_a_saved_sequence_comes_back_by_joining_what_is_live_and_restoring_the_rest() -> None:
    pool = make()
    keeper, saved = run(pool, PROMPT), run(pool, PROMPT[:80] + token_array([700] * 20))
    pool.operations()
    tokens = saved.tokens()
    key = pool.save(saved, 64)
    pool.drop(saved)
    assert pool.operations() == (Save(saved.id, 64, 100, key), Remove(saved.id, 0, None))
    back = pool.join(A, tokens, RequestId("again"))
    assert back is not None
    assert pool.restore(back, tokens[80:], (slab := FakeSlab(80, ()),))
    assert pool.operations() == (Copy(keeper.id, back.id, 0, 80), Restore(back.id, (slab,)))
    assert list(back.tokens()) == list(tokens)
    assert pool.hit_tokens["stored"] == 20
    pool.check()


def test_what_does_not_fit_is_not_restored() -> None:
    pool = make(n_cells=150)
    run(pool, PROMPT)
    other = pool.join(A, token_array([5]), RequestId("other"))
    assert other is not None
    pool.operations()
    assert not pool.restore(other, token_array(range(60)), (FakeSlab(0, ()),))
    assert pool.operations() == ()
    pool.check()


def test_whoever_is_evicted_is_asked_for_first() -> None:
    pool = make(n_cells=128)
    asked: list[tuple[int, int]] = []
    pool.before_eviction = lambda sequence: asked.append((sequence.id, sequence.length))
    first = run(pool, PROMPT)
    pool.finish(first)
    assert pool.make_room(90)
    assert asked == [(first.id, 100)]


def test_streams_copy_and_count_every_holder() -> None:
    pool = make(n_cells=800, layout=Layout.STREAMS)
    run(pool, PROMPT[:60])
    run(pool, PROMPT[:60] + token_array([5]))
    assert pool.used_cells == 121
    assert pool.hit_tokens["prefilling"] == 60


def test_without_sharing_only_a_whole_idle_conversation_is_continued() -> None:
    pool = make(share=False)
    first = run(pool, PROMPT)
    assert pool.lookup(A, PROMPT + token_array([1])) == 0
    pool.finish(first)
    assert pool.lookup(A, PROMPT + token_array([1])) == 100
    assert pool.lookup(A, PROMPT[:50] + token_array([1])) == 0


def test_a_recurrent_model_is_never_joined_in_the_middle() -> None:
    pool = make(shareable=False)
    pool.finish(run(pool, PROMPT))
    assert pool.lookup(A, PROMPT[:50]) == 0
    assert pool.lookup(A, PROMPT + token_array([1])) == 100


def test_statistics_tell_shared_from_own() -> None:
    pool = make()
    run(pool, PROMPT, "one")
    run(pool, PROMPT[:40] + token_array([3]), "two")
    picture = pool.statistics()
    assert (picture.used_cells, picture.shared_cells, picture.saved_cells) == (101, 40, 40)
    assert [(s.n_tokens, s.shared_tokens, s.request_id) for s in picture.sequences] == [(100, 40, "one"), (41, 40, "two")]
    (namespace,) = picture.namespaces
    assert (namespace.cells, namespace.hit_tokens, namespace.missed_tokens) == (101, 40, 101)


def test_interleaved_decoding_fragments_and_a_rebuild_mends_it() -> None:
    pool = make()
    one, two = run(pool, token_array([1, 2])), run(pool, token_array([3, 4]))
    for token in range(10, 18):
        pool.extend(one, token_array([token]))
        pool.extend(two, token_array([token]))
    assert pool.fragmentation > 0.7
    pool.operations()
    segments = pool.segments()
    assert sorted((s.holders, s.p0, s.p1) for s in segments) == [((0,), 0, 10), ((1,), 0, 10)]
    pool.rebuilt(pool.shape)
    assert pool.fragmentation == 0
    pool.check()


def test_of_equal_sequences_that_leave_their_streams_one_stays() -> None:
    pool = make(layout=Layout.STREAMS)
    sequences = [run(pool, PROMPT), run(pool, PROMPT)]
    for sequence in sequences:
        pool.finish(sequence)
    pool.operations()
    pool.rebuilt(replace(pool.shape, layout=Layout.UNIFIED))
    pool.check()
    assert len(pool.sequences) == 1
    assert pool.used_cells == len(PROMPT)


@pytest.mark.parametrize("damage", ["holder", "count", "id"])
def test_the_check_notices(damage: str) -> None:
    pool = make()
    sequence = run(pool, PROMPT)
    if damage == "holder":
        sequence.tail.holders.clear()
    elif damage == "count":
        pool.holdings.lock(A, 1)
    else:
        del pool.sequences[SeqId(0)]
    with pytest.raises(InvariantBroken):
        pool.check()
