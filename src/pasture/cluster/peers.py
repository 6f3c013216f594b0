"""KV between replicas: fetched from a peer for a prompt that comes, carried to the others when a replica is drained.

Everything here may fail and then was not worth having: what is not fetched is recomputed, what cannot be carried will be. A
fetch may take as long as computing the tokens would, and no longer. Exports are checked by the service that takes them in
(model, checksum, lengths). Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pasture.cluster.conversations import Conversation
from pasture.cluster.link import Link, ReplicaLost, open_link
from pasture.cluster.members import Member
from pasture.cluster.messages import Source
from pasture.cluster.ring import Ring
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core.errors import PastureError
from pasture.core.ports import Service
from pasture.core.storage import BLOCK_TOKENS
from pasture.core.values import Request

log = logging.getLogger(__name__)

MIN_PULL_SECONDS, MAX_PULL_SECONDS = 0.25, 30.0
CARRY_SECONDS = 60.0
"""for one conversation"""
CARRIED_AT_ONCE = 4
HEAD_TOKENS = 16 * BLOCK_TOKENS
"""conversations that begin alike so far go to the same replica"""


@dataclass(frozen=True, slots=True)
class Pulled:
    n_tokens: int
    n_bytes: int
    seconds: float


class Peers:
    """The links of one replica to others."""

    def __init__(self, service: Service, key: bytes) -> None:
        self._service = service
        self._key = key
        self._links: dict[tuple[ReplicaId, Epoch], asyncio.Task[Link]] = {}

    def close(self) -> None:
        for opening in self._links.values():
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            else:
                opening.cancel()

    async def pull(self, request: Request, source: Source) -> Pulled | None:
        """Fetch what the source has of the prompt; None when it is here already, or could not be had in time."""
        tokens = array("i", request.prompt[: source.n_tokens])
        have = await self._service.locate(request.namespace, tokens)
        if len(tokens) - max(have.live_tokens, have.ram_tokens) < BLOCK_TOKENS:
            return None
        rate = self._service.statistics().store.prefill_tokens_per_second
        patience = min(MAX_PULL_SECONDS, max(MIN_PULL_SECONDS, len(tokens) / max(1.0, rate)))
        started = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                exported = await (await self._link(source.member)).export(request.namespace, tokens)
            restored = await self._service.restore(request.namespace, tokens, exported) if exported else 0
        except (ReplicaLost, PastureError, TimeoutError) as error:
            log.info("nothing fetched from %s: %s", source.member.replica, error or "it took too long")
            return None
        return Pulled(restored, len(exported), time.monotonic() - started) if restored else None

    async def carry(self, conversations: Iterator[Conversation], members: Sequence[Member]) -> dict[str, int]:
        """Give each conversation to one of `members`, the latest first; returns counts. Those who get it tell the routers."""
        ring, by_name = Ring(), {member.replica: member for member in members}
        ring.set_members(by_name)
        counts = {"conversations": 0, "carried": 0, "tokens": 0, "bytes": 0}

        async def worker() -> None:
            for conversation in conversations:
                counts["conversations"] += 1
                for replica in ring.order(conversation.tokens[:HEAD_TOKENS].tobytes()):
                    n_tokens, n_bytes = await self._carry_one(conversation, by_name[replica])
                    if n_tokens:
                        counts["carried"] += 1
                        counts["tokens"] += n_tokens
                        counts["bytes"] += n_bytes
                        break

        await asyncio.gather(*(worker() for _ in range(CARRIED_AT_ONCE)))
        return counts

    async def _carry_one(self, conversation: Conversation, to: Member) -> tuple[int, int]:
        """(tokens, bytes) that it took in."""
        try:
            async with asyncio.timeout(CARRY_SECONDS):
                namespace, tokens = conversation.namespace, conversation.tokens
                exported = await self._service.export(namespace, tokens)
                if not exported:
                    return 0, 0
                link = await self._link(to)
                return await link.restore(namespace, tokens, exported, conversation.session), len(exported)
        except (ReplicaLost, PastureError, TimeoutError) as error:
            log.warning("a conversation was not taken by %s: %s", to.replica, error or "it took too long")
            return 0, 0

    async def _link(self, member: Member) -> Link:
        name = (member.replica, member.epoch)
        opening = self._links.get(name)
        if opening is not None and opening.done() and (opening.exception() is not None or opening.result().closed.is_set()):
            opening = None
        if opening is None:
            opening = self._links[name] = asyncio.create_task(open_link(member, self._key))
        return await asyncio.shield(opening)
