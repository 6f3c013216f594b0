"""A radix tree over token ids, one root a namespace, whose nodes know who holds them.

The tree is used twice: the live cache keeps one (a node's tokens are cells, its holders are sequences), and the scheduler keeps
one of promises (a node's tokens will soon be cells, its holders are requests that are being prefilled). It knows nothing of
engines, sequence ids or time.

Invariants, checked by `RadixTree.check`:
- a node that is not a root has at least one token and at least one holder;
- children start where their parent ends, and no two children of a node start with the same token;
- who holds a node holds its parent (so the holders of a path only grow fewer downwards).

Not thread-safe. Source of the structure: SGLang's RadixAttention (Zheng et al., 2024), with holders in place of lock counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import numpy as np

from pasture.core.errors import InvariantBroken
from pasture.core.values import Namespace

H = TypeVar("H", bound=Hashable)

_NUMBERS = count(1)


def token_array(tokens: Iterable[int]) -> array[int]:
    """Token ids in the form the tree stores and compares them: a C int array."""
    return array("i", tokens)


def common_prefix(a: array[int], a0: int, b: array[int], b0: int) -> int:
    """How many tokens of `a[a0:]` and `b[b0:]` agree from the start."""
    n = min(len(a) - a0, len(b) - b0)
    if n <= 0 or a[a0] != b[b0]:
        return 0
    if n == 1:
        return 1
    # numpy views, dropped before anyone appends: an exported buffer locks an array's size
    left = np.frombuffer(a, dtype=np.intc, count=n, offset=a0 * a.itemsize)
    right = np.frombuffer(b, dtype=np.intc, count=n, offset=b0 * b.itemsize)
    differs = left != right
    first = int(differs.argmax())
    return first if differs[first] else n


class Node(Generic[H]):
    """Tokens at the positions `[start, end)` that follow the parent's."""

    __slots__ = ("breaks", "children", "hits", "holders", "last_used", "number", "parent", "running", "start", "tokens")

    def __init__(self, parent: Node[H] | None, start: int, tokens: array[int]) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: dict[int, Node[H]] = {}
        self.holders: set[H] = set()
        self.running = 0
        """holders that are not idle"""
        self.last_used = 0.0
        self.hits = 0
        """requests that found it here when they came; both parts of a divided node keep the count"""
        self.breaks: list[int] = []
        """positions whose cell does not follow the cell of the position before, ascending"""
        self.number = next(_NUMBERS)
        """what it is called; the upper part of a divided node keeps it"""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __bool__(self) -> bool:
        return True

    def path(self) -> Iterator[Node[H]]:
        """This node and its ancestors up to, and without, the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def path_tokens(self) -> array[int]:
        """All tokens from position 0 to this node's end."""
        out = token_array(())
        for node in reversed(list(self.path())):
            out.extend(node.tokens)
        return out


@dataclass(frozen=True, slots=True)
class Match(Generic[H]):
    """A longest common prefix: it ends `offset` tokens into `node` (a root, or `0 < offset <= len(node)`)."""

    node: Node[H]
    offset: int
    length: int


class RadixTree(Generic[H]):
    def __init__(self) -> None:
        self._roots: dict[Namespace, Node[H]] = {}
        self.n_tokens = 0
        """tokens in all nodes"""

    def root(self, namespace: Namespace) -> Node[H]:
        """The namespace's root; made when first asked for."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, 0, token_array(()))
        return root

    def namespaces(self) -> tuple[Namespace, ...]:
        return tuple(self._roots)

    def forget_empty(self) -> None:
        """Drop the roots that have no children, so that namespaces do not pile up."""
        for namespace in [name for name, root in self._roots.items() if not root.children]:
            del self._roots[namespace]

    def match(self, namespace: Namespace, tokens: array[int]) -> Match[H]:
        """The longest prefix of `tokens` that is in the tree. Changes nothing."""
        node, at = self._roots.get(namespace), 0
        if node is None:
            return Match(Node(None, 0, token_array(())), 0, 0)
        offset = 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                break
            offset = common_prefix(child.tokens, 0, tokens, at)
            node, at = child, at + offset
            if offset < len(child):
                break
        return Match(node, offset if node.parent is not None else 0, at)

    def cut(self, match: Match[H]) -> Node[H]:
        """The node that ends where the match ends. Splits a node when the match ends inside it."""
        if match.node.parent is None or match.offset == len(match.node):
            return match.node
        return self.split(match.node, match.offset)

    def split(self, node: Node[H], offset: int) -> Node[H]:
        """Divide a node; the new upper part `[start, start + offset)` is returned, `node` itself becomes the lower part."""
        parent = node.parent
        assert parent is not None
        assert 0 < offset < len(node)
        upper: Node[H] = Node(parent, node.start, node.tokens[:offset])
        upper.holders = set(node.holders)
        upper.running = node.running
        upper.last_used = node.last_used
        upper.hits = node.hits
        upper.number, node.number = node.number, upper.number
        cut_position = node.start + offset
        upper.breaks = [p for p in node.breaks if p < cut_position]
        node.breaks = [p for p in node.breaks if p >= cut_position]
        parent.children[upper.tokens[0]] = upper
        node.tokens = node.tokens[offset:]
        node.start = cut_position
        node.parent = upper
        upper.children[node.tokens[0]] = node
        return upper

    def hold(self, node: Node[H], holder: H) -> list[Node[H]]:
        """Add a holder to a node and its ancestors; returns the nodes that did not have it before, deepest first."""
        fresh = []
        for step in node.path():
            if holder in step.holders:
                break
            step.holders.add(holder)
            fresh.append(step)
        return fresh

    def grow(self, node: Node[H], tokens: array[int], holder: H) -> Node[H]:
        """Append tokens below `node` for a holder that ends there; no child may start with `tokens[0]`.

        Extends `node` in place when nobody else holds it, else makes a child. Returns the node that now ends the path.
        """
        self.n_tokens += len(tokens)
        if node.parent is not None and len(node.holders) == 1 and not node.children:
            node.tokens.extend(tokens)
            return node
        assert tokens[0] not in node.children
        child: Node[H] = Node(node, node.end, token_array(tokens))
        child.holders.add(holder)
        node.children[tokens[0]] = child
        return child

    def insert(self, namespace: Namespace, tokens: array[int], holder: H) -> Node[H]:
        """Hold a whole path, making what is missing of it. Returns the node in which it ends."""
        match = self.match(namespace, tokens)
        node = self.cut(match) if match.length else self.root(namespace)
        self.hold(node, holder)
        return self.grow(node, tokens[match.length :], holder) if match.length < len(tokens) else node

    def leave(self, node: Node[H], holder: H, down_to: Node[H] | None = None) -> list[Node[H]]:
        """Take a holder off a node and its ancestors, as far as (and without) `down_to`.

        Nodes that nobody is left in are removed. Returns every node that was left, deepest first, removed ones included (they
        are recognised by their empty `holders`).
        """
        left = []
        for step in list(node.path()):
            if step is down_to:
                break
            step.holders.discard(holder)
            left.append(step)
            if not step.holders:
                assert step.parent is not None
                assert not step.children
                del step.parent.children[step.tokens[0]]
                self.n_tokens -= len(step)
        return left

    def nodes(self, namespace: Namespace | None = None) -> Iterator[Node[H]]:
        """Every node but the roots, parents before children."""
        roots = self._roots.values() if namespace is None else [self.root(namespace)]
        stack = [child for root in roots for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Raises InvariantBroken when the structure contradicts itself."""
        n_tokens = 0
        for node in self.nodes():
            n_tokens += len(node)
            parent = node.parent
            if not node.tokens or not node.holders:
                raise InvariantBroken(f"node at {node.start} has {len(node)} tokens and {len(node.holders)} holders")
            if parent is None or parent.children.get(node.tokens[0]) is not node or parent.end != node.start:
                raise InvariantBroken(f"node at {node.start} does not hang where its parent ends")
            if parent.parent is not None and not node.holders <= parent.holders:
                raise InvariantBroken(f"node at {node.start} has holders that its parent lacks")
        if n_tokens != self.n_tokens:
            raise InvariantBroken(f"the tree counts {self.n_tokens} tokens and holds {n_tokens}")
