"""What is being prefilled: the prompts of started requests, as a radix tree whose holders are tasks.

A waiting request whose prompt goes on along a promise beyond what is computed already waits for it, and joins the cells when
they are there. So a prefix is computed once even when everyone asks for it in the same instant.
"""

from __future__ import annotations

from pasture.kv.radix import Node, RadixTree
from pasture.scheduler.task import Task


class Promises:
    def __init__(self) -> None:
        self._tree: RadixTree[Task] = RadixTree()
        self._ends: dict[Task, Node[Task]] = {}

    def add(self, task: Task) -> None:
        """The task will compute all its tokens."""
        self._ends[task] = self._tree.insert(task.request.namespace, task.tokens, task)

    def remove(self, task: Task) -> None:
        """The task has computed its prompt, or never will. Without effect when it promised nothing."""
        end = self._ends.pop(task, None)
        if end is not None:
            self._tree.leave(end, task)
            if not self._ends:
                self._tree.forget_empty()

    def longest(self, task: Task) -> tuple[int, Task | None]:
        """How much of a waiting task's prompt (all but its last token) is promised, and by whom: the one furthest along."""
        match = self._tree.match(task.request.namespace, task.tokens[:-1])
        if match.length == 0:
            return 0, None
        return match.length, max(match.node.holders, key=lambda t: t.computed)
