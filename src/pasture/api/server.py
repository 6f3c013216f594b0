"""uvicorn around the app: TLS, the real port, and an end in two stages.

The first SIGTERM or SIGINT drains: the service takes nothing new, readiness turns 503 while the sockets still listen, open
streams finish, then the server stops; those that take longer than a drain may are ended. The second ends at once: the service
is closed, which ends every stream and keeps nothing more, and connections are dropped. A drained server returns from `run` as
after any other end, so the process exits with what its caller decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from pasture.api.gateway import Gateway
from pasture.api.heads import BoundedHeads
from pasture.api.loiterers import Loiterers
from pasture.core.errors import ConfigError
from pasture.core.ports import Service

_log = logging.getLogger("pasture.api")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
_SWEEP_TICKS = 50
_LAST_WORDS_SECONDS = 1.0
_LAST_BYTES_SECONDS = 10
"""for connections whose replies have ended, and who reads them slowly"""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to serve on a socket."""

    ssl_cert_file: str | None = None
    ssl_key_file: str | None = None
    log_level: str = "info"
    keep_alive_seconds: int = 75


def run(
    app: FastAPI,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    ssl_cert_file: str | None = None,
    ssl_key_file: str | None = None,
    log_level: str = "info",
    sockets: list[socket.socket] | None = None,
    on_started: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal ends it. `sockets`, already bound, replace host and port (0: any free one).

    `on_started` is called with the server's URL once it listens. The app must come from `create_app`. Blocks; takes the main
    thread's signal handlers for as long as it runs. Raises ConfigError when it cannot listen there or use that certificate.
    """
    options = ServerOptions(ssl_cert_file, ssl_key_file, log_level)
    server = DrainingServer(app, options, on_started)
    server.run(sockets or [bind(host, port)])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises ConfigError with the reason where it cannot be had."""
    if not 0 <= port < 65536:
        raise ConfigError(f"cannot listen on port {port}: a port is a number from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains before it stops."""

    def __init__(self, app: FastAPI, options: ServerOptions, on_started: Callable[[str], None] | None = None) -> None:
        config = uvicorn.Config(
            app,
            ssl_certfile=options.ssl_cert_file,
            ssl_keyfile=options.ssl_key_file,
            timeout_keep_alive=options.keep_alive_seconds,
            timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
            log_level=_uvicorn_level(options.log_level),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=BoundedHeads,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"the TLS certificate or its key cannot be used: {error.strerror or error}") from error
        super().__init__(config)
        self._service: Service = app.state.service
        self._gateway: Gateway = app.state.gateway
        self._on_started = on_started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._signalled = False
        self._loiterers = Loiterers(time.monotonic)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._gateway.pinned.started()
            self._gateway.repairs.started()
        if self._on_started is not None and self.started:
            self._on_started(self.url)

    @property
    def url(self) -> str:
        """Where the server listens, with the port it really has."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._gateway.pinned.close()
        await self._gateway.repairs.close()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second: every few seconds, who owes a request for too long is dropped."""
        if counter % _SWEEP_TICKS == 0:
            self._loiterers.sweep(self.server_state.connections)
        return await super().on_tick(counter)

    def stop(self) -> None:
        """What the first signal does; the second call does what the second signal does. On the loop's thread."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
            return
        _log.warning("second signal: ending at once")
        self._closing = asyncio.ensure_future(asyncio.to_thread(self._service.close, at_once=True))
        self.force_exit = self.should_exit = True
        # streams have a moment to say that the server has closed
        asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS, self._drop_everything)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn's own raises the signals again at the end, so that a drained process would die of the SIGTERM it obeyed
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        except ValueError:  # only the main thread hears signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.stop)

    async def _drain(self) -> None:
        _log.info("draining: nothing new is taken, open replies finish")
        try:
            if not await self._service.drain():
                _log.warning("open replies take longer than a drain may: they are ended")
                await asyncio.to_thread(self._service.close)
        finally:
            self.should_exit = True

    def _drop_everything(self) -> None:
        if self._draining is not None:
            self._draining.cancel()
        for task in list(self.server_state.tasks):
            task.cancel()
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def _uvicorn_level(level: str) -> str:
    # at "info" uvicorn tells every start and stop in its own words; pasture has its own
    return "warning" if level == "info" else level
