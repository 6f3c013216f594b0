"""The store over a real disk cache: what one server has stored, the next one has, and nobody gets anything wrong."""

from __future__ import annotations

import threading
from array import array
from contextlib import closing
from pathlib import Path

import pytest

from pasture.tiers.disk import DiskTier
from pasture.tiers.gate import OpenGate
from pasture.tiers.sealed import SealedWire
from pasture.tiers.store import TieredStore, open_store
from pasture.tiers.wire import Wire
from tests.tier_support import NAME, PlainCodec, cells_of, put, slab_of, toks

WIRES: dict[str, Wire | None] = {"plain": None, "sealed": SealedWire(bytes(range(32)))}
SHARED = toks(range(200))
ONE, OTHER = SHARED + toks(range(1000, 1100)), SHARED + toks(range(2000, 2130))


def opened(directory: Path, wire: Wire | None, *, divisible: bool = True) -> TieredStore:
    slow = DiskTier(directory / "cache", 1 << 24, wire=wire)
    return open_store(PlainCodec(), 1 << 30, divisible=divisible, slow=[slow], gate=OpenGate())


def lifted(store: TieredStore, tokens: array[int]) -> int:
    """How many leading tokens the store has once it has looked on disk; they are right."""
    came = threading.Event()
    lift = store.lift(NAME, tokens, 0, came.set)
    assert lift is not None
    assert came.wait(60)
    n_tokens = store.reach(NAME, tokens)
    assert cells_of(store.take(NAME, tokens, 0, n_tokens)) == list(slab_of(tokens, 0, n_tokens).cells)
    lift.release()
    return n_tokens


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_a_restart_forgets_nothing(tmp_path: Path, wire: Wire | None) -> None:
    with closing(opened(tmp_path, wire)) as store:
        put(store, ONE)
        put(store, OTHER)
        assert store.flush(60)
    with closing(opened(tmp_path, wire)) as store:
        assert store.reach(NAME, ONE) == 0
        assert lifted(store, ONE) == len(ONE), "to the last token, although the last block is short"
        assert lifted(store, OTHER + toks(range(50))) == len(OTHER), "the next turn finds all of the last"
        assert lifted(store, SHARED[:192] + toks([5] * 100)) == 192
    figures = [tier for tier in store.statistics().tiers if tier.name == "disk"]
    assert figures[0].errors == figures[0].damaged_blocks == 0


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
@pytest.mark.parametrize("n_tokens", [300, 256, 40])
def test_checkpoints_come_back_whole(tmp_path: Path, wire: Wire | None, n_tokens: int) -> None:
    with closing(opened(tmp_path, wire, divisible=False)) as store:
        put(store, ONE[:n_tokens])
        assert store.flush(60)
    with closing(opened(tmp_path, wire, divisible=False)) as store:
        assert lifted(store, ONE + toks([7])) == n_tokens


@pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES)
def test_two_servers_read_what_the_other_wrote(tmp_path: Path, wire: Wire | None) -> None:
    with closing(opened(tmp_path, wire)) as one, closing(opened(tmp_path, wire)) as other:
        put(one, ONE)
        put(other, OTHER)
        assert one.flush(60)
        assert other.flush(60)
        assert lifted(other, ONE) == len(ONE)
        assert lifted(one, OTHER) == len(OTHER)


def test_a_damaged_block_ends_what_is_lifted(tmp_path: Path) -> None:
    with closing(opened(tmp_path, None)) as store:
        put(store, ONE)
        assert store.flush(60)
    third = next(file for file in (tmp_path / "cache").rglob("*.kv") if file.read_bytes()[12:16] == (128).to_bytes(4, "little"))
    content = bytearray(third.read_bytes())
    content[-1] ^= 1
    third.write_bytes(content)
    with closing(opened(tmp_path, None)) as store:
        assert lifted(store, ONE) == 128
        put(store, ONE)
        assert store.flush(60)
    with closing(opened(tmp_path, None)) as store:
        assert lifted(store, ONE) == len(ONE), "what was recomputed is stored again"
