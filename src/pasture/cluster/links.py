"""An ingress' connections to all replicas, kept up with the directory, and the router that learns from what they say.

    directory, twice a second  ──► who should be there    connect, drain, let go
    a link is up               ──► router.join, observe   with the replica's epoch, from a snapshot on
    a session is somewhere     ──► on_home                told to all ingresses by the replica that has answered it
    a link is lost             ──► router.leave           in the same turn of the loop: nothing is credited to the dead

A replica whose vocabulary is another than the ingress' is left alone: its tokens would mean something else. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pasture.cluster import messages
from pasture.cluster.link import Link, ReplicaLost, open_link
from pasture.cluster.members import Directory, Member
from pasture.cluster.messages import News
from pasture.cluster.pulling import PullCosts
from pasture.cluster.router import Router
from pasture.cluster.values import Capacity, Delta, Load, ReplicaId, SessionKey, Snapshot
from pasture.core.statistics import ServiceStatistics
from pasture.core.storage import BlockKey
from pasture.core.values import Namespace
from pasture.tiers.keys import KEY_BYTES

log = logging.getLogger(__name__)

DIRECTORY_SECONDS = 0.25
OnHome = Callable[[SessionKey, BlockKey | None, ReplicaId], None]
"""a session, the key of its conversation's last full block, and where it is"""


class Links:
    def __init__(
        self, directory: Directory, key: bytes, router: Router, costs: PullCosts, vocabulary: str, on_home: OnHome
    ) -> None:
        """`vocabulary`: the ingress' mark; see `vocabulary_mark`."""
        self.router = router
        self.open: dict[ReplicaId, Link] = {}
        self.statistics: dict[ReplicaId, ServiceStatistics] = {}
        self.fingerprint = b""
        """of the model and format that most replicas have: prompts are looked up under its keys"""
        self._directory = directory
        self._key = key
        self._costs = costs
        self._vocabulary = vocabulary
        self._on_home = on_home
        self._opening: dict[ReplicaId, asyncio.Task[None]] = {}
        self._strangers: set[Member] = set()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._watching: set[asyncio.Task[None]] = set()
        self._kept_for: Mapping[Namespace, float] | None = None

    def start(self) -> None:
        """On the loop that everything here is used on."""
        self._following = asyncio.create_task(self._follow())

    def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
        for opening in self._opening.values():
            opening.cancel()
        for link in self.open.values():
            link.close()

    def keep_for(self, seconds: Mapping[Namespace, float]) -> None:
        """How long replicas keep KV of these namespaces: who comes is told first of all."""
        self._kept_for = seconds
        for link in self.open.values():
            link.keep_for(seconds)

    def others_than(self, fingerprint: str) -> frozenset[ReplicaId]:
        """Who computes with something else, and cannot go on with what was begun with this."""
        return frozenset(name for name, link in self.open.items() if link.identity.fingerprint != fingerprint)

    async def changed(self, timeout_seconds: float) -> None:
        """Wait until somebody comes or goes, so long at most."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    # Following the directory

    async def _follow(self) -> None:
        while True:
            try:
                self._compare(await self._directory.members())
            except Exception as error:  # whatever it is made of may fail, and the last list goes on to count
                log.warning("the list of replicas cannot be read: %s", error)
            await asyncio.sleep(DIRECTORY_SECONDS)

    def _compare(self, members: Sequence[Member]) -> None:
        for member in members:
            link = self.open.get(member.replica)
            if link is not None and link.member.epoch < member.epoch:
                link.close()  # it has restarted, and this connection has not noticed yet
                self._lost(link)
                link = None
            if link is None and member.replica not in self._opening and member not in self._strangers:
                opening = self._opening[member.replica] = asyncio.create_task(self._open(member))
                opening.add_done_callback(partial(self._opened, member.replica))
            if link is not None and member.draining:
                self.router.drain(member.replica)

    def _opened(self, replica: ReplicaId, _: asyncio.Task[None]) -> None:
        self._opening.pop(replica, None)

    async def _open(self, member: Member) -> None:
        holder: list[Link] = []

        def on_news(news: News, payload: bytes) -> None:
            if holder:
                self._news(holder[0], news, payload)

        try:
            link = await open_link(member, self._key, on_news)
        except ReplicaLost as lost:
            log.debug("%s", lost)
            return
        if link.identity.vocabulary != self._vocabulary:
            log.error("%s has another vocabulary than this ingress, and gets no requests", member.replica)
            self._strangers.add(member)
            link.close()
            return
        holder.append(link)
        self.open[member.replica] = link
        if self._kept_for is not None:
            link.keep_for(self._kept_for)
        self._count_fingerprints()
        self.router.join(member.replica, member.epoch, Capacity(1000.0))
        if member.draining:
            self.router.drain(member.replica)
        log.info("%s is there (%s port %d)", member.replica, member.host, member.port)
        self._changed.set()
        watching = asyncio.create_task(self._watch(link))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)

    async def _watch(self, link: Link) -> None:
        await link.closed.wait()
        self._lost(link)

    def _lost(self, link: Link) -> None:
        replica = link.member.replica
        if self.open.get(replica) is link:
            del self.open[replica]
            self._count_fingerprints()
            self.statistics.pop(replica, None)
            self.router.leave(replica)
            log.warning("%s is gone", replica)
            self._changed.set()

    def _count_fingerprints(self) -> None:
        common = Counter(link.identity.fingerprint for link in self.open.values()).most_common(1)
        self.fingerprint = bytes.fromhex(common[0][0]) if common else b""

    # News

    def _news(self, link: Link, news: News, payload: bytes) -> None:
        member = link.member
        if self.open.get(member.replica) is not link:
            return
        match news:
            case messages.Statistics(found):
                self.statistics[member.replica] = found
                rate = found.store.prefill_tokens_per_second
                self._costs.observe_prefill(rate)
                self.router.join(member.replica, member.epoch, Capacity(max(1.0, rate)))
            case messages.Homes(homes):
                for session, key in homes:
                    block = None if key is None else BlockKey(bytes.fromhex(key))
                    self._on_home(SessionKey(session), block, member.replica)
            case messages.Pulled(n_bytes, seconds):
                self._costs.observe(n_bytes, seconds)
            case messages.Delta(number, n_stored, uncached_tokens):
                keys, load = _keys(payload), Load(uncached_tokens)
                self._observe(link, Delta(member.replica, member.epoch, number, keys[:n_stored], keys[n_stored:], load))
            case messages.Snapshot(number, uncached_tokens):
                load = Load(uncached_tokens)
                self._observe(link, Snapshot(member.replica, member.epoch, number, _keys(payload), load))

    def _observe(self, link: Link, event: Delta | Snapshot) -> None:
        if self.router.observe(event) is not None:
            link.ask_snapshot()


def _keys(payload: bytes) -> list[BlockKey]:
    return [BlockKey(payload[at : at + KEY_BYTES]) for at in range(0, len(payload), KEY_BYTES)]
