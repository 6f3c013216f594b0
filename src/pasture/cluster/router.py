"""The router: which replica a request goes to, and what that one should fetch instead of recomputing.

    its session is at home at a replica          there, until it is saturated
    enough of its prompt is somewhere            there, until it is saturated; what is being computed counts
    its beginning was sent to one before         there, until it is saturated: a slow tier may have it
    none of these                                by the ring, over its first blocks, to the first within the load bound
    saturated                                    where it costs least, pulling its blocks from who has them if that pays

A replica is saturated when the uncached tokens in flight there are more than it can prefill in the tolerated time to the first
token. What a request costs somewhere is the time until its first token and, several times over, the work it makes, because
everybody who comes after it waits for that too: so conversations move rarely, and by pulling rather than by recomputing.

Policy and nothing else: no clock, no I/O, no randomness; the same calls give the same answers, so ingresses that see the same
events decide alike, and the simulator drives this very class. `place` only asks; `started` and the rest tell. One thread.
Source of the load bound: Mirrokni, Thorup, Zadimoghaddam, Consistent Hashing with Bounded Loads (2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pasture.cluster.catalogue import Catalogue
from pasture.cluster.coming import Coming
from pasture.cluster.homes import Homes
from pasture.cluster.loads import Loads
from pasture.cluster.ring import Ring
from pasture.cluster.values import (
    Capacity,
    Decision,
    Delta,
    Epoch,
    Placement,
    Pull,
    Reason,
    ReplicaId,
    RouterStatistics,
    SessionKey,
    Snapshot,
    SnapshotRequest,
)
from pasture.core.storage import BLOCK_TOKENS, BlockKey
from pasture.core.values import RequestId

PullSeconds = Callable[[int], float | None]
"""Seconds that fetching so many tokens' KV from another replica takes; None where recomputing wins."""


@dataclass(frozen=True, slots=True)
class RouterSettings:
    tolerated_ttft_seconds: float = 2.0
    load_bound: float = 1.25
    """a new conversation goes to nobody with more than so many times the mean load"""
    ring_tokens: int = 1024
    """of a prompt's beginning that place a new conversation on the ring"""
    prefix_tokens: int = 1024
    """known somewhere, they are reason enough to go there"""
    work_weight: float = 8.0
    """how often, beside its own wait, the work that a request makes counts when it looks for another replica"""
    max_sessions: int = 100_000
    """whose home is remembered, and so many beginnings of prompts; the least recently used are forgotten"""
    block_tokens: int = BLOCK_TOKENS


def never_pull(n_tokens: int) -> float | None:
    """Nothing can be fetched from another replica."""
    return None


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a request would find at one replica."""

    replica: ReplicaId
    cached_tokens: int
    """known to be there"""
    expected_tokens: int
    """those, and what is being computed there"""
    uncached_tokens: int
    """beside what is expected and pulled"""
    seconds: float
    """until its first token: what is before it, its pull and its own prefill"""
    work_seconds: float
    """its pull and its own prefill"""
    pull: Pull | None


class Router:
    """See the module. `pull_seconds` is the cost gate's judgement of moving blocks between replicas."""

    def __init__(self, settings: RouterSettings | None = None, pull_seconds: PullSeconds = never_pull) -> None:
        self._settings = settings or RouterSettings()
        self._pull_seconds = pull_seconds
        self._catalogue = Catalogue()
        self._loads = Loads()
        self._coming = Coming()
        self._ring = Ring()
        self._capacities: dict[ReplicaId, Capacity] = {}
        """of who can be given requests"""
        self._draining: set[ReplicaId] = set()
        self._sessions: Homes[SessionKey] = Homes(self._settings.max_sessions)
        self._heads: Homes[BlockKey] = Homes(self._settings.max_sessions)
        self._decisions: Counter[Reason] = Counter()
        self._pulls = 0

    # Who there is

    def join(self, replica: ReplicaId, epoch: Epoch, capacity: Capacity) -> None:
        """It takes requests from now on. Again in the same epoch: its capacity has changed. An older epoch changes nothing."""
        if self._begin(replica, epoch):
            self._capacities[replica] = capacity
            self._lay_out()

    def attach(self, pool: ReplicaId, epoch: Epoch) -> None:
        """It holds blocks and serves nobody: a shared pool, which blocks are pulled from."""
        self._begin(pool, epoch)

    def drain(self, replica: ReplicaId) -> None:
        """It gets no more requests; what it holds can be pulled until it leaves."""
        self._draining.add(replica)
        self._lay_out()

    def leave(self, replica: ReplicaId) -> None:
        """It is gone, with all it held and all that was in flight there; nothing happens when it is unknown."""
        self._catalogue.drop(replica)
        self._loads.forget(replica)
        self._coming.forget(replica)
        self._capacities.pop(replica, None)
        self._draining.discard(replica)
        self._lay_out()

    def replicas(self) -> list[ReplicaId]:
        """Who can be given requests."""
        return [replica for replica in self._capacities if replica not in self._draining]

    # What they tell

    def observe(self, event: Delta | Snapshot) -> SnapshotRequest | None:
        """Learn from an event; says when a snapshot has to be asked for. Events of strangers are dropped."""
        if event.replica not in self._catalogue:
            return None
        self._begin(event.replica, event.epoch)
        wanted = self._catalogue.apply(event)
        if event.load is not None and event.epoch == self._catalogue.epoch(event.replica):
            self._loads.reported(event.replica, event.load)
        return wanted

    # What is asked

    def place(self, placement: Placement) -> Decision | None:
        """Where it should go; None when nobody can take it. Changes nothing but the figures."""
        offers = self._offers(placement)
        if not offers:
            return None
        wanted, reason = self._wanted(placement, offers)
        if self._is_saturated(wanted):
            cheapest = min(offers.values(), key=lambda offer: (self._cost(offer), offer.replica != wanted.replica))
            reason = Reason.BUSY if cheapest.replica == wanted.replica else Reason.SPILLED
            wanted = cheapest
        self._decisions[reason] += 1
        self._pulls += wanted.pull is not None
        return Decision(wanted.replica, reason, wanted.cached_tokens, wanted.uncached_tokens, wanted.pull)

    # What has become of it

    def started(self, request: RequestId, placement: Placement, decision: Decision) -> None:
        """It was sent where the decision says; its session is at home there from now on. Nothing where that has left."""
        epoch = self._catalogue.epoch(decision.replica)
        if epoch is None:
            return
        self._loads.started(request, decision.replica, decision.uncached_tokens)
        head = self._head(placement)
        if head is not None:
            self._heads.sent(head, decision.replica, epoch)
            self._coming.started(request, head, decision.replica, placement.path)
        if placement.session is not None:
            self._sessions.sent(placement.session, decision.replica, epoch)

    def progress(self, request: RequestId, uncached_tokens: int) -> None:
        """So many of its prompt's tokens are left to compute; 0 from its first token on."""
        self._loads.progress(request, uncached_tokens)

    def finished(self, request: RequestId) -> None:
        """It has ended, however; nothing happens when it is unknown."""
        self._loads.finished(request)
        self._coming.finished(request)

    def known_blocks(self, replica: ReplicaId) -> int:
        """How many it is credited with; 0 for a stranger."""
        return self._catalogue.credited(replica)

    def statistics(self) -> RouterStatistics:
        return RouterStatistics(
            decisions=dict(self._decisions),
            pulls=self._pulls,
            gaps=self._catalogue.gaps,
            stale_events=self._catalogue.stale,
            sessions=len(self._sessions),
            known_blocks=len(self._catalogue),
            uncached_tokens={replica: self._loads.of(replica) for replica in self._capacities},
        )

    # Choosing

    def _wanted(self, placement: Placement, offers: Mapping[ReplicaId, _Offer]) -> tuple[_Offer, Reason]:
        """Where it belongs, whatever the load there."""
        home = self._standing(self._sessions.find(placement.session), offers)
        if home is not None:
            return home, Reason.SESSION
        best = max(offers.values(), key=lambda offer: (offer.expected_tokens, -offer.seconds))
        if best.expected_tokens >= self._settings.prefix_tokens:
            return best, Reason.PREFIX
        home = self._standing(self._heads.find(self._head(placement)), offers)
        if home is not None:
            return home, Reason.HEAD
        return self._by_ring(placement, offers), Reason.RING

    def _standing(self, home: tuple[ReplicaId, Epoch] | None, offers: Mapping[ReplicaId, _Offer]) -> _Offer | None:
        """What a home offers that has not restarted since, and can be given requests."""
        if home is None or self._catalogue.epoch(home[0]) != home[1]:
            return None
        return offers.get(home[0])

    def _head(self, placement: Placement) -> BlockKey | None:
        """The key of its beginning; None for a prompt without blocks."""
        depth = max(1, self._settings.ring_tokens // self._settings.block_tokens)
        return placement.path[min(depth, len(placement.path)) - 1] if placement.path else None

    def _by_ring(self, placement: Placement, offers: Mapping[ReplicaId, _Offer]) -> _Offer:
        """The first on the ring within the load bound; the soonest where there is no key, or nobody within it."""
        soonest = min(offers.values(), key=lambda offer: offer.seconds)
        head = self._head(placement)
        if head is None:
            return soonest
        rates = {replica: self._capacities[replica].prefill_tokens_per_second for replica in offers}
        total = sum(map(self._loads.of, offers)) + placement.n_tokens
        bound_seconds = self._settings.load_bound * total / sum(rates.values())
        order = (replica for replica in self._ring.order(head) if replica in offers)
        fitting = (offers[replica] for replica in order if self._loads.of(replica) / rates[replica] <= bound_seconds)
        return next(fitting, soonest)

    def _offers(self, placement: Placement) -> dict[ReplicaId, _Offer]:
        leading = self._catalogue.leading(placement.path)
        owner = max(leading, key=lambda holder: leading[holder], default=None)
        most = leading[owner] if owner is not None else 0
        head = self._head(placement)
        coming = self._coming.leading(head, placement.path) if head is not None else {}
        offers: dict[ReplicaId, _Offer] = {}
        for replica in self.replicas():
            if replica in placement.avoid:
                continue
            has = leading.get(replica, 0)
            expected = max(has, coming.get(replica, 0))
            pull = Pull(owner, expected, most) if owner is not None and most > expected else None
            offers[replica] = self._offer(placement, replica, (has, expected), pull)
        return offers

    def _offer(self, placement: Placement, replica: ReplicaId, blocks: tuple[int, int], pull: Pull | None) -> _Offer:
        """`blocks`: from the first, that are known to be there, and that are expected."""
        cached, expected = (self._tokens(placement, n) for n in blocks)
        rate = self._capacities[replica].prefill_tokens_per_second
        pulled, pulling = 0, 0.0
        if pull is not None:
            pulled = self._tokens(placement, pull.last) - expected
            seconds = self._pull_seconds(pulled)
            if seconds is None:
                pull, pulled = None, 0
            else:
                pulling = seconds
        uncached = placement.n_tokens - expected - pulled
        work = pulling + uncached / rate
        return _Offer(replica, cached, expected, uncached, self._loads.of(replica) / rate + work, work, pull)

    def _cost(self, offer: _Offer) -> float:
        return offer.seconds + self._settings.work_weight * offer.work_seconds

    def _tokens(self, placement: Placement, n_blocks: int) -> int:
        """That leading blocks save; the last token of a prompt is always computed."""
        return min(n_blocks * self._settings.block_tokens, max(0, placement.n_tokens - 1))

    def _is_saturated(self, offer: _Offer) -> bool:
        can = self._capacities[offer.replica].prefill_tokens_per_second * self._settings.tolerated_ttft_seconds
        return self._loads.of(offer.replica) > can

    # Members

    def _begin(self, replica: ReplicaId, epoch: Epoch) -> bool:
        """Whether this epoch is the one that counts now; a new one begins with nothing in flight."""
        before = self._catalogue.epoch(replica)
        if not self._catalogue.begin(replica, epoch):
            return False
        if before is not None and epoch > before:
            self._loads.forget(replica)
            self._coming.forget(replica)
            self._draining.discard(replica)
        return True

    def _lay_out(self) -> None:
        self._ring.set_members(self.replicas())
