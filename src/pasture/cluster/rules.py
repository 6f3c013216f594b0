"""The rules that the router is compared with in simulation, each as its source describes it, with its source's defaults.

    random          anywhere
    ring            consistent hashing of the first two blocks
    bounded ring    the same, to the first who has at most 1.25 times the mean load (Mirrokni et al., 2018)
    sglang-like     the shortest queue when queues differ by more than 64 requests and by more than half; else the shortest of
                    those with the best match, if that is above 0.3; else the shortest (cache-aware policy of SGLang's router)
    dynamo-like     least prefill blocks plus decode blocks (NVIDIA Dynamo's KV router: weight 1, temperature 0)

They see the simulated nodes as they are at that moment, without the delay of events, so they are if anything flattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from pasture.cluster.ring import Ring
from pasture.cluster.values import ReplicaId
from pasture.core.storage import BlockKey
from pasture.foresight.nodes import Choice, Job, Node
from pasture.foresight.traces import TRACE_BLOCK_TOKENS

HASHED_BLOCKS = 2
LOAD_BOUND = 1.25
MATCH_RATIO = 0.3
QUEUE_DIFFERENCE = 64
QUEUE_RATIO = 1.5


class Stateless:
    """A rule that remembers nothing and looks at the nodes."""

    def placed(self, job: Job, choice: Choice) -> None: ...
    def prefilled(self, job: Job) -> None: ...
    def finished(self, job: Job) -> None: ...
    def changed(self, node: int, stored: Sequence[BlockKey], removed: Sequence[BlockKey]) -> None: ...


class Anywhere(Stateless):
    def __init__(self, n_nodes: int) -> None:
        self._random = Random(0)

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        return Choice(self._random.randrange(len(nodes)))


class ByRing(Stateless):
    def __init__(self, n_nodes: int) -> None:
        self._ring = Ring()
        self._ring.set_members(ReplicaId(str(number)) for number in range(n_nodes))

    def order(self, job: Job) -> list[int]:
        return [int(name) for name in self._ring.order(b"".join(job.path[:HASHED_BLOCKS]))]

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        return Choice(self.order(job)[0])


class ByBoundedRing(ByRing):
    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        total = sum(node.uncached_tokens for node in nodes) + job.request.n_tokens
        bound = LOAD_BOUND * total / len(nodes)
        return Choice(next(number for number in self.order(job) if nodes[number].uncached_tokens <= bound))


class SglangLike(Stateless):
    def __init__(self, n_nodes: int) -> None: ...

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        queues = [node.n_requests for node in nodes]
        considered = list(nodes)
        if max(queues) - min(queues) <= QUEUE_DIFFERENCE or max(queues) <= QUEUE_RATIO * min(queues):
            matches = {node.number: node.leading(job) for node in nodes}
            best = max(matches.values())
            if best > MATCH_RATIO * len(job.path):
                considered = [node for node in nodes if matches[node.number] == best]
        return Choice(min(considered, key=lambda node: node.n_requests).number)


class DynamoLike(Stateless):
    def __init__(self, n_nodes: int) -> None: ...

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        def cost(node: Node) -> float:
            prefill = node.uncached_tokens / TRACE_BLOCK_TOKENS + len(job.path) - node.leading(job)
            return prefill + node.active_blocks + len(job.path)

        return Choice(min(nodes, key=cost).number)
