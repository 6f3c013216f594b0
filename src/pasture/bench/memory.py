"""Peak memory of a process and its children while they are measured.

Proportional set size where the kernel tells it (a page shared by n processes counts 1/n), resident size elsewhere. Sampled
about once a second in a worker thread, so peaks shorter than that may be missed; KV buffers and weights live much longer.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

import psutil

INTERVAL_SECONDS = 1.0


def tree_bytes(pid: int) -> int:
    """Bytes that the process and its descendants hold now; 0 once they are gone."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in processes:
        try:
            total += int(getattr(process.memory_full_info(), "pss", 0)) or process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


class MemoryWatch:
    """Samples from entering until leaving; `peak_bytes` grows meanwhile."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MemoryWatch:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def sample(self) -> int:
        """The peak, a fresh sample included."""
        self.peak_bytes = max(self.peak_bytes, await asyncio.to_thread(tree_bytes, self._pid))
        return self.peak_bytes

    async def _watch(self) -> None:
        while True:
            await self.sample()
            await asyncio.sleep(INTERVAL_SECONDS)
