"""The RAM tier alone: what is evicted, what stays, what takes whose place, and that the books add up."""

from __future__ import annotations

from array import array
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.values import Form, Namespace
from pasture.tiers.block import Block
from pasture.tiers.entries import BLOCK_OVERHEAD_BYTES, Entry, LazyHeap, SortKey
from pasture.tiers.eviction import ordered_by
from pasture.tiers.index import MAX_CANDIDATES
from pasture.tiers.memory import MemoryTier
from pasture.tiers.trail import REMEMBERED_TOKENS, Trail, Trails, common_prefix
from tests.tier_support import toks

PAYLOAD = 1000
SIZE = PAYLOAD + BLOCK_OVERHEAD_BYTES
TRAILS = Trails(b"model")


def trail(tokens: array[int]) -> Trail:
    return TRAILS.of(Namespace("n"), tokens)


def insert(memory: MemoryTier, tokens: array[int], *, n_bytes: int = PAYLOAD) -> int:
    """Insert what is missing of the conversation until one is refused; returns how many blocks went in."""
    path = trail(tokens)
    blocks = [
        Block(a, tokens[a.p0 : a.p1], Form.RAW, np.zeros(n_bytes, np.uint8), not memory.divisible)
        for a in memory.missing(path, 0, len(tokens), use=True)
    ]
    return sum(1 for _ in takewhile(memory.insert, blocks))


def conversation(number: int, n_tokens: int = 128) -> array[int]:
    return toks([number, *range(n_tokens - 1)])


def test_bytes_are_payloads_and_the_stated_overhead() -> None:
    memory = MemoryTier(1 << 20)
    insert(memory, conversation(1))
    insert(memory, conversation(1))
    statistics = memory.statistics()
    assert (statistics.blocks, statistics.bytes) == (2, 2 * SIZE)
    assert statistics.bytes_by_form == {Form.RAW: 2 * SIZE}
    assert statistics.written_bytes == 2 * PAYLOAD


def test_the_least_recently_used_leaf_goes_first_and_prefixes_last() -> None:
    memory = MemoryTier(4 * SIZE)
    for number in (1, 2):
        insert(memory, conversation(number))
    assert len(memory.fetch(trail(conversation(1)), 64, 128)) == 1  # a use of the whole path
    insert(memory, conversation(3, 64))
    assert [memory.reach(trail(conversation(n))) for n in (1, 2, 3)] == [128, 64, 64]
    insert(memory, conversation(4, 64))
    assert [memory.reach(trail(conversation(n))) for n in (1, 2, 3, 4)] == [128, 0, 64, 64]
    assert memory.statistics().evicted_blocks == 2
    memory.check()


def test_a_conversation_larger_than_the_budget_keeps_its_head() -> None:
    memory = MemoryTier(3 * SIZE)
    assert insert(memory, conversation(1, 640)) == 3
    assert memory.reach(trail(conversation(1, 640))) == 192
    assert insert(memory, conversation(2, 64), n_bytes=3 * SIZE) == 0
    assert memory.reach(trail(conversation(1, 640))) == 192  # nothing made way for what cannot fit
    memory.check()


def test_a_policy_is_a_sort_key() -> None:
    def newest(entry: Entry) -> SortKey:
        return (-entry.last_used,)

    memory = MemoryTier(2 * SIZE, policy=ordered_by(newest))
    for number in (1, 2, 3):
        insert(memory, conversation(number, 64))
    assert [memory.reach(trail(conversation(n, 64))) for n in (1, 2, 3)] == [64, 0, 64]


def test_pins_hold_beyond_the_budget_and_let_go_at_once() -> None:
    memory = MemoryTier(4 * SIZE)
    insert(memory, conversation(1))
    first, second = memory.pin(trail(conversation(1))), memory.pin(trail(conversation(1)))
    assert memory.pinned_bytes == 2 * SIZE
    memory.resize(SIZE)
    assert memory.used_bytes == memory.pinned_bytes == 2 * SIZE
    assert insert(memory, conversation(2)) == 0
    first.release()
    first.release()
    assert memory.reach(trail(conversation(1))) == 128
    second.release()
    assert (memory.pinned_bytes, memory.used_bytes) == (0, SIZE)
    assert memory.reach(trail(conversation(1))) == 64
    memory.check()


def test_a_longer_sibling_takes_a_short_blocks_place_unless_that_is_pinned() -> None:
    memory = MemoryTier(1 << 20, n_writers=1)
    insert(memory, conversation(1, 70))
    pin = memory.pin(trail(conversation(1, 70)))
    insert(memory, conversation(1, 100))
    assert memory.statistics().blocks == 3
    pin.release()
    assert memory.statistics().blocks == 2
    insert(memory, conversation(1, 128))
    assert memory.statistics().blocks == 2
    written = [memory.next_unwritten(), memory.next_unwritten(), memory.next_unwritten()]
    assert [None if item is None else len(item.supersedes) for item in written] == [0, 2, None]
    memory.check()


def test_a_shorter_end_of_something_stored_is_not_stored_again() -> None:
    memory = MemoryTier(1 << 20)
    insert(memory, conversation(1, 100))
    assert insert(memory, conversation(1, 80)) == 0
    assert insert(memory, conversation(1, 64)) == 0


def test_the_sibling_that_agrees_longest_serves() -> None:
    memory = MemoryTier(1 << 20)
    for n_common in (3, 40, 17):
        insert(memory, toks([*range(n_common), *range(900, 964 - n_common)]))
    assert memory.reach(trail(toks(range(64)))) == 40


def test_only_a_few_siblings_are_compared() -> None:
    memory = MemoryTier(1 << 22)
    insert(memory, toks([*range(60), 1, 1, 1, 1]))
    for number in range(MAX_CANDIDATES):
        insert(memory, toks([0, 500 + number, *range(62)]))
    assert memory.reach(trail(toks(range(64)))) == 1


def test_checkpoints_need_no_parents_and_never_serve_in_part() -> None:
    memory = MemoryTier(2 * SIZE, divisible=False)
    insert(memory, conversation(1, 100))
    insert(memory, conversation(1, 200))
    assert memory.reach(trail(conversation(1, 150))) == 100
    assert [block.address.p1 for block in memory.fetch(trail(conversation(1, 300)), 0, 200)] == [200]
    assert memory.fetch(trail(conversation(1, 300)), 0, 150) == ()
    assert memory.fetch(trail(conversation(1, 300)), 100, 200) == ()
    insert(memory, conversation(2, 64))
    assert memory.reach(trail(conversation(1, 150))) == 0
    assert memory.reach(trail(conversation(1, 250))) == 200
    memory.check()


def test_watermarks() -> None:
    memory = MemoryTier(100 * SIZE)
    for number in range(97):
        insert(memory, conversation(number, 64))
    assert memory.trim() == 0
    insert(memory, conversation(1000, 64))
    assert memory.trim() == 5 * SIZE
    assert memory.used_bytes == 93 * SIZE


def test_what_nobody_shares_is_squeezed_before_what_many_do() -> None:
    memory = MemoryTier(1 << 20, squeeze_stages=1)
    system = toks(range(64))
    insert(memory, system)
    for number in range(4):
        insert(memory, toks([*system, 700 + number, *range(63)]))
    insert(memory, conversation(9, 64))
    pin = memory.pin(trail(conversation(9, 64)))
    order = []
    while (found := memory.next_to_squeeze()) is not None:
        block, stage = found
        order.append(block.tokens[0])
        assert memory.replace(block, Block(block.address, block.tokens, Form.Q8_0, np.zeros(500, np.uint8)), stage + 1)
        assert not memory.replace(block, block, 0)
    assert order == [700, 701, 702, 703, 0, 9]
    assert memory.statistics().bytes_by_form == {Form.Q8_0: 6 * (500 + BLOCK_OVERHEAD_BYTES)}
    memory.check()
    pin.release()
    memory.check()


def test_what_was_pinned_when_it_was_looked_at_has_its_turn_when_it_is_let_go() -> None:
    memory = MemoryTier(1 << 20, squeeze_stages=1)
    for number in range(4):
        insert(memory, conversation(number, 64))
    pin = memory.pin(trail(conversation(0, 64)))
    order = []
    for _ in range(4):
        found = memory.next_to_squeeze()
        assert found is not None
        block, stage = found
        order.append(block.tokens[0])
        assert memory.replace(block, Block(block.address, block.tokens, Form.Q8_0, block.payload), stage + 1)
        pin.release()
    assert order == [1, 0, 2, 3], "the coldest was held as the first was taken"
    assert memory.next_to_squeeze() is None


def test_a_damaged_block_goes_though_it_is_pinned() -> None:
    memory = MemoryTier(1 << 20)
    insert(memory, conversation(1))
    pin = memory.pin(trail(conversation(1)))
    memory.drop_damaged(memory.fetch(trail(conversation(1)), 0, 64)[0])
    memory.check()
    pin.release()
    memory.check()
    assert memory.reach(trail(conversation(1))) == 0
    assert memory.statistics().damaged_blocks == 1


class Item:
    def __init__(self, key: int) -> None:
        self.key = key
        self.wanted = True


def test_a_lazy_heap_follows_keys_that_rise_and_forgets_the_unwanted() -> None:
    heap: LazyHeap[Item] = LazyHeap(lambda item: (item.key,), lambda item: item.wanted)
    items = [Item(key) for key in range(3000)]
    for item in items:
        heap.push(item)
        heap.push(item)
        item.wanted = item.key % 1000 == 0
    assert len(heap._heap) < 2000
    items[0].key = 5000
    assert [heap.pop(), heap.pop(), heap.pop(), heap.pop()] == [items[1000], items[2000], items[0], None]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.sampled_from(["rises", "falls", "pop", "out"]))))
def test_a_lazy_heap_is_exact_where_falling_keys_are_pushed_again(moves: list[tuple[int, int, str]]) -> None:
    heap: LazyHeap[Item] = LazyHeap(lambda item: (item.key,), lambda item: item.wanted)
    items = [Item(5) for _ in range(6)]
    inside: set[Item] = set()
    for number, by, move in moves:
        item = items[number]
        if move == "pop":
            popped, least = heap.pop(), min((item.key for item in inside if item.wanted), default=None)
            assert (popped.key if popped is not None else None) == least
            inside = {item for item in inside if item.wanted and item is not popped}
            continue
        item.wanted = move != "out"
        item.key += by if move == "rises" else -by
        heap.push(item)
        inside.add(item)
    heap._sweep()
    rest = list(iter(heap.pop, None))
    assert [item.key for item in rest] == sorted(item.key for item in inside if item.wanted)
    assert len(set(rest)) == len(rest)


@pytest.mark.parametrize(("a", "b", "n"), [([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1], [2], 0), ([], [1], 0)])
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(toks(a), toks(b)) == n
    assert common_prefix(toks([7] * 60 + a), toks([7] * 60 + b)) == 60 + n


def test_trails_are_found_again_and_do_not_pile_up() -> None:
    trails = Trails(b"model")
    tokens = conversation(1, 1000)
    first = trails.of(Namespace("n"), tokens)
    tokens.append(5)
    assert trails.of(Namespace("n"), conversation(1, 1000)) is first
    assert trails.of(Namespace("n"), tokens) is not first
    assert trails.of(Namespace("other"), conversation(1, 1000))[0].key != first[0].key
    for number in range(2 * REMEMBERED_TOKENS // 1000):
        trails.of(Namespace("n"), conversation(number, 1000))
    assert sum(len(kept) for kept in trails._trails.values()) <= REMEMBERED_TOKENS
