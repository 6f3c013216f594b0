"""The router and other rules over simulated nodes and recorded traffic: `pasture simulate --nodes`.

Wraps `Router` as a rule of `foresight.nodes`, feeds it the events a cluster would send, and gathers the figures of all rules
under one load model. Prints nothing. Every figure that comes from here is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pasture.cluster.ring import Ring
from pasture.cluster.router import PullSeconds, Router, RouterSettings, never_pull
from pasture.cluster.rules import Anywhere, ByBoundedRing, ByRing, DynamoLike, SglangLike
from pasture.cluster.values import Capacity, Decision, Delta, Epoch, Placement, Reason, ReplicaId
from pasture.core.storage import BlockKey
from pasture.core.values import RequestId
from pasture.foresight.nodes import Choice, Job, LoadModel, Node, Rule
from pasture.foresight.nodes_replay import FleetReplay, FleetTally
from pasture.foresight.policies import POLICIES
from pasture.foresight.replay import Replay, key_of
from pasture.foresight.traces import TRACE_BLOCK_TOKENS, TraceRequest

EPOCH = Epoch(1)
SETTINGS = RouterSettings(block_tokens=TRACE_BLOCK_TOKENS)
"""the router's own, but for the length of a trace's blocks"""


class Routed:
    """The router as a rule; clients send no session ids, as with the plain API."""

    def __init__(self, n_nodes: int, model: LoadModel, pull_seconds: PullSeconds) -> None:
        self.router = Router(SETTINGS, pull_seconds)
        self._numbers = [0] * n_nodes
        self._decision: Decision | None = None
        for node in range(n_nodes):
            self.router.join(_name(node), EPOCH, Capacity(model.prefill_tokens_per_second))

    def place(self, job: Job, nodes: Sequence[Node]) -> Choice:
        decision = self.router.place(_placement(job))
        assert decision is not None, "simulated nodes do not leave"
        self._decision = decision
        return Choice(int(decision.replica), int(decision.pull.owner) if decision.pull is not None else None)

    def placed(self, job: Job, choice: Choice) -> None:
        assert self._decision is not None
        self.router.started(_request(job), _placement(job), self._decision)

    def prefilled(self, job: Job) -> None:
        self.router.progress(_request(job), 0)

    def finished(self, job: Job) -> None:
        self.router.finished(_request(job))

    def changed(self, node: int, stored: Sequence[BlockKey], removed: Sequence[BlockKey]) -> None:
        self._numbers[node] += 1
        self.router.observe(Delta(_name(node), EPOCH, self._numbers[node], stored, removed))


def _name(node: int) -> ReplicaId:
    return ReplicaId(str(node))


def _request(job: Job) -> RequestId:
    return RequestId(str(job.number))


def _placement(job: Job) -> Placement:
    return Placement(job.path, job.request.n_tokens)


OURS = "pasture"
RULES: dict[str, Callable[[int, LoadModel], Rule]] = {
    OURS: lambda n, model: Routed(n, model, model.pull_seconds),
    "pasture, no pulls": lambda n, model: Routed(n, model, never_pull),
    "random": lambda n, model: Anywhere(n),
    "ring": lambda n, model: ByRing(n),
    "bounded ring": lambda n, model: ByBoundedRing(n),
    "sglang-like": lambda n, model: SglangLike(n),
    "dynamo-like": lambda n, model: DynamoLike(n),
}
"""what is compared, in this order"""


@dataclass(frozen=True, slots=True)
class FleetResult:
    """One rule."""

    rule: str
    tally: FleetTally
    decisions: Mapping[Reason, int]
    """of the router; empty for the other rules"""


@dataclass(frozen=True, slots=True)
class FleetComparison:
    results: tuple[FleetResult, ...]
    pool_hit_ratio: float
    """of one pool with all the capacity and no waiting: what no placement is expected to beat"""
    taken_by_another_node: float
    """the share of the ring's keys that one more node takes, counted on the trace's own keys"""


def compare(
    requests: Sequence[TraceRequest],
    n_nodes: int,
    capacity_tokens: int,
    policy: str,
    *,
    model: LoadModel | None = None,
    in_flight: int | None = None,
    rules: Sequence[str] = tuple(RULES),
    each: Callable[[str], object] = lambda rule: None,
) -> FleetComparison:
    """Replay the trace under every rule. `in_flight`: see `FleetReplay.play`; `each` is called after every reply."""
    assumed = model or LoadModel()

    def result(name: str) -> FleetResult:
        rule = RULES[name](n_nodes, assumed)
        replay = FleetReplay(n_nodes, capacity_tokens, POLICIES[policy], rule, assumed)
        tally = replay.play(requests, in_flight, lambda: each(name))
        return FleetResult(name, tally, rule.router.statistics().decisions if isinstance(rule, Routed) else {})

    results = tuple(map(result, rules))
    pool = Replay(capacity_tokens, POLICIES[policy]).play(requests).hit_ratio
    return FleetComparison(results, pool, taken_by_another(requests, n_nodes))


def taken_by_another(requests: Sequence[TraceRequest], n_nodes: int) -> float:
    """The share of all prompts' beginnings whose place on the ring changes when `n_nodes` become one more."""
    depth = max(1, SETTINGS.ring_tokens // TRACE_BLOCK_TOKENS)
    heads = {key_of(request.blocks[:depth][-1]) for request in requests if request.blocks}
    few, more = Ring(), Ring()
    few.set_members(map(_name, range(n_nodes)))
    more.set_members(map(_name, range(n_nodes + 1)))
    return sum(few.owner(head) != more.owner(head) for head in heads) / max(1, len(heads))
