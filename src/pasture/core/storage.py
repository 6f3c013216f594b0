"""Where KV is when it is not in the live cache: the ports between scheduler, stores and engine.

    engine (SlabCodec: slab <-> bytes)      scheduler -> Store (RAM; behind it SlowTier: disk, remote)

A *block* is the KV of `BLOCK_TOKENS` consecutive tokens `[64k, 64k + 64)`; the last of a conversation may be shorter. Its key
is a hash over its parent's key and its tokens, so it stands for the whole prefix; the root takes the namespace and the model's
fingerprint. A hash finds, tokens confirm. Models whose state cannot be cut (recurrent, hybrid) store *checkpoints* instead: a
whole state `[0, p1)`, filed under the key of the full block it ends in or behind, and usable only at exactly `p1`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from pasture.core.values import Allowance, Form, Kind, Namespace, Slab, Transfer

Bytes = NDArray[np.uint8]
"""a flat buffer, read only by agreement"""

BLOCK_TOKENS = 64

BlockKey = NewType("BlockKey", bytes)
"""32 bytes: a prefix of tokens in one namespace on one model"""


class SlabCodec(Protocol):
    """Slabs as flat bytes and back. Any thread may `pack` and `squeeze`; `unpack` belongs to the engine's thread."""

    @property
    def fingerprint(self) -> bytes:
        """Equal only where stored KV may be exchanged: file content, architecture, KV types, rope, flash attention, format."""
        ...

    def pack(self, slab: Slab) -> Bytes:
        """The slab's rows in one new buffer that describes itself (number of caches, types, row sizes)."""
        ...

    def unpack(self, payload: Bytes, p0: int, p1: int) -> Slab:
        """A slab in the types that the live cache has now, whatever form the payload is in.

        Raises EngineError on anything that is not exactly the KV of `p1 - p0` tokens of this model.
        """
        ...

    def squeeze(self, payload: Bytes, form: Form) -> Bytes:
        """The payload in Q8_0 or Q4_0. Returned as it is where that would not make it smaller. Never widens."""
        ...


class Pin(Protocol):
    """Keeps blocks in RAM until it is released. Pinned bytes count, but are never refused."""

    def release(self) -> None:
        """Safe to call twice."""
        ...


class Lift(Protocol):
    """Blocks on their way from a slow tier into RAM, for one prompt. Holds what has come until it is released."""

    @property
    def done(self) -> bool: ...
    def release(self) -> None:
        """Let go of what came, and stop fetching. Safe to call twice."""
        ...


class Store(Protocol):
    """All tiers below the live cache, as the engine's thread sees them. No call waits for a disk or a network.

    `tokens` is always a whole prefix from position 0; ranges are half open positions in it.
    """

    def worth_saving(self, n_tokens: int) -> bool:
        """Whether to ask for the `gap` of so many tokens: what is put stays, and saving so much may pay. Looks nothing up."""
        ...

    @property
    def persistent(self) -> bool:
        """Whether what is put outlives the process."""
        ...

    def arrived(self, namespace: Namespace, tokens: array[int]) -> None:
        """A request with this prompt begins, whatever it will find: this is what the future is guessed from."""
        ...

    def allow(self, namespace: Namespace, allowance: Allowance) -> None:
        """Somebody of this namespace asks for something, under these terms: what it may hold below the live cache."""
        ...

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """How long what nobody uses is kept of these namespaces, all that differ; nothing where nothing expires."""
        ...

    def finished(self, namespace: Namespace, tokens: array[int], kind: Kind) -> None:
        """A request has ended with these tokens, its reply included; `kind` is what is expected next."""
        ...

    def prefetch(self, namespace: Namespace, tokens: array[int], ready: Callable[[], None]) -> None:
        """Somebody will ask for what begins with these tokens: bring them into RAM, and keep them for a while.

        `ready` is called once, from any thread, when what can be had is there or nobody needs it any more.
        """
        ...

    def reach(self, namespace: Namespace, tokens: array[int]) -> int:
        """How many leading tokens could be had from RAM now; a block that parts midway counts as far as it agrees."""
        ...

    def lift(self, namespace: Namespace, tokens: array[int], have: int, ready: Callable[[], None]) -> Lift | None:
        """Look in the slow tiers for what follows `tokens[:have]`, and bring it into RAM where that beats recomputing.

        None when there is no slow tier to ask. `ready` is called once from another thread when the lift is done, found or not.
        """
        ...

    def take(self, namespace: Namespace, tokens: array[int], p0: int, p1: int) -> tuple[Slab, ...]:
        """The KV of `tokens[p0:p1]` from RAM, ready for a Restore; empty when not all is there, or recomputing is cheaper."""
        ...

    def gap(self, namespace: Namespace, tokens: array[int], p0: int) -> int:
        """From where on `tokens` would have to be saved so that, with what is stored, all of `tokens[p0:]` is stored.

        `len(tokens)` when it is stored already, or not worth storing; otherwise a multiple of `BLOCK_TOKENS`, perhaps below p0
        (0 for a model whose states cannot be cut).
        """
        ...

    def put(self, namespace: Namespace, tokens: array[int], slab: Slab) -> None:
        """Store `tokens[slab.p0:slab.p1]`; `slab.p0` came from `gap`, `slab.p1 <= len(tokens)`. Equal blocks exist once."""
        ...

    def hold(self, namespace: Namespace, tokens: array[int], slab: Slab) -> Pin:
        """`put`, but whatever the budget says, and pinned: for what must come back."""
        ...

    def pin(self, namespace: Namespace, tokens: array[int]) -> Pin:
        """Keep what RAM has of `tokens`, as far as `reach` goes, until the pin is released."""
        ...

    def held_by_slow(self, namespace: Namespace, tokens: array[int]) -> Mapping[str, int]:
        """How many leading tokens each slow tier has, by its name. Asks them, so it may wait; any thread but the engine's."""
        ...

    def observe(self, transfers: Sequence[Transfer]) -> None:
        """What saving and restoring costs at the engine."""
        ...

    def observe_prefill(self, tokens_per_second: float) -> None:
        """What recomputing costs at present."""
        ...

    def statistics(self) -> StoreStatistics: ...
    def flush(self, timeout_seconds: float) -> bool:
        """Wait until what is in RAM and should be in a slow tier is there; False when time ran out."""
        ...

    def close(self) -> None:
        """Stop the background threads and close the files. What was put before stays where it is."""
        ...


@dataclass(frozen=True, slots=True)
class RemoteServerStatistics:
    """One store that a remote tier asks; counters since start."""

    address: str
    state: str
    """of its breaker: closed (asked), open (left alone) or half-open (being probed)"""
    openings: int
    """times that it went away"""
    failures: int
    round_trip_seconds: float
    """the median of the last ones measured; 0: none yet"""
    slow_round_trip_seconds: float
    """all but one in a hundred were faster"""


@dataclass(frozen=True, slots=True)
class RemoteStatistics:
    """What only a remote tier has."""

    kind: str
    """redis or mooncake"""
    transport: str
    """what is in fact used: tcp, tls or rdma"""
    sealed: bool
    """blocks are encrypted before they leave this machine"""
    warnings: tuple[str, ...]
    """what is not as it was asked for"""
    servers: tuple[RemoteServerStatistics, ...]


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """One tier; counters since start."""

    name: str
    blocks: int
    bytes: int
    budget_bytes: int
    pinned_bytes: int
    in_flight_bytes: int
    """being written or read in the background, beside `bytes`"""
    bytes_by_form: Mapping[Form, int]
    hit_tokens: int
    missed_tokens: int
    written_bytes: int
    read_bytes: int
    evicted_blocks: int
    damaged_blocks: int
    """found unreadable or not what they claimed, and dropped"""
    errors: int
    latency_seconds: float
    """of a small read, measured"""
    bytes_per_second: float
    """of a large read, measured"""
    remote: RemoteStatistics | None = None


@dataclass(frozen=True, slots=True)
class PrefetchStatistics:
    """What was brought into RAM before anybody asked for it; counters since start."""

    hints: int = 0
    """conversations that somebody said would go on"""
    guesses: int = 0
    """conversations that were expected to go on"""
    cancelled: int = 0
    """times that it stopped because real work came"""
    issued_blocks: int = 0
    issued_bytes: int = 0
    used_bytes: int = 0
    """of those issued, what a request has used"""
    wasted_bytes: int = 0
    """of those issued, what left RAM unused"""
    cpu_seconds: float = 0.0
    """of the thread that does it"""


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Every tier below the live cache, fastest first, and what the cost gate goes by."""

    tiers: tuple[TierStatistics, ...]
    prefill_tokens_per_second: float
    save_bytes_per_second: float
    restore_bytes_per_second: float
    gate_refusals: Mapping[str, int]
    """transfers that were not made because recomputing is cheaper, by kind: fetch, spill"""
    prefetch: PrefetchStatistics = PrefetchStatistics()
    policy_seconds: float = 0.0
    """CPU time that the choice of what stays in RAM has taken"""
