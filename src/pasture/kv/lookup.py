"""Questions to the tree of live cells that change nothing: what a prompt could reuse, from whom, and what that would lock."""

from __future__ import annotations

from array import array

from pasture.core.statistics import SequenceState
from pasture.core.values import Namespace
from pasture.kv.eviction import Candidate
from pasture.kv.radix import Match, Node, RadixTree
from pasture.kv.sequence import Sequence


def reusable(tree: RadixTree[Sequence], namespace: Namespace, prompt: array[int], *, joins: bool) -> Match[Sequence]:
    """The longest prefix of `prompt[:-1]` that a request may start from; without `joins`, only a whole idle sequence."""
    match = tree.match(namespace, prompt[:-1])
    if joins:
        return match
    node = match.node
    if match.offset < len(node) and node.parent is not None:
        node = node.parent
    for step in node.path():
        if idle_sequence_at(step) is not None:
            return Match(step, len(step), step.end)
    return Match(tree.root(namespace), 0, 0)


def idle_sequence_at(node: Node[Sequence]) -> Sequence | None:
    """An idle sequence that ends where the node ends."""
    return next((sequence for sequence in node.holders if sequence.idle and sequence.tail is node), None)


def holders_state(node: Node[Sequence]) -> str:
    """What the liveliest holder does: running, prefilling or idle."""
    states = {sequence.state for sequence in node.holders}
    if SequenceState.DECODING in states:
        return "running"
    return "prefilling" if SequenceState.PREFILLING in states else "idle"


def unlocked_tokens(match: Match[Sequence]) -> int:
    """Tokens of a matched path that no running sequence holds."""
    unlocked = 0
    for node in match.node.path():
        if node.running:
            break  # whoever runs through a node runs through its ancestors
        unlocked += match.offset if node is match.node else len(node)
    return unlocked


def candidate(sequence: Sequence, *, guaranteed: bool) -> Candidate:
    """An idle sequence's leaf, as an eviction policy sees it."""
    leaf = sequence.tail
    return Candidate(sequence.namespace, leaf.start, len(leaf), leaf.last_used, guaranteed)
