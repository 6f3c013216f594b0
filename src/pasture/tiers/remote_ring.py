"""Which of several plain servers holds a name: a ketama ring, so that one more or less of them moves about 1/N of the names.

A server that does not answer is passed over, and the next on the ring takes its place until it is back; what was written
meanwhile is then where nobody looks any more, which is a miss. Every client with the same list of servers agrees, in whatever
order it is written. The ring is uhashring's. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from pasture.tiers.remote_server import Server


class Ring:
    """`replicas`: on how many servers a name should be, 1 or more."""

    def __init__(self, servers: Sequence[Server], replicas: int = 1) -> None:
        self.servers = tuple(servers)
        self.replicas = min(replicas, len(servers))
        self._by_address = {server.address: server for server in servers}
        self._ring = None
        if len(servers) > 1:
            from uhashring import HashRing  # type: ignore[import-untyped]

            self._ring = HashRing(sorted(self._by_address), hash_fn="ketama")

    def of(self, name: bytes) -> list[Server]:
        """Those that hold the name, or should, the first to ask first; none where no server answers."""
        if self._ring is None:
            return [server for server in self.servers if server.answers]
        found: list[Server] = []
        for node in self._ring.range(name.hex(), unique=True):
            server = self._by_address[node["nodename"]]
            if server.answers:
                found.append(server)
                if len(found) == self.replicas:
                    break
        return found
