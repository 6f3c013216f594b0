"""One ingress in its process: the API that a single machine serves, over the replicas of the cluster.

Ingresses of one machine listen on one port together (SO_REUSEPORT): the kernel deals out the connections, and the port stays
answered when one of them dies. Tenants, keys and sessions are in the database that all of them share. An ingress loads the
vocabulary and nothing else of the model.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from dataclasses import replace

from pasture.api import create_app
from pasture.api.server import DrainingServer, ServerOptions
from pasture.api.tracing import open_tracing
from pasture.cluster.members import Directory
from pasture.cluster.service import ClusterService, ClusterSettings
from pasture.config import Settings
from pasture.core.errors import ConfigError, EngineError
from pasture.core.ports import Vocabulary
from pasture.core.values import ModelInfo
from pasture.engine.fake import FakeEngine
from pasture.fleet.loops import LoopThread
from pasture.fleet.routes import cluster_routes, picture
from pasture.server import api_settings, keep_sweeping, open_state, settle, start_engine

log = logging.getLogger(__name__)

START_SECONDS = 60.0
BACKLOG = 2048


class RunningIngress:
    """Listens when it is made. `close` lets what runs through it finish first."""

    def __init__(self, settings: Settings, key: bytes, directory: Directory) -> None:
        self._tracing = open_tracing(settings.otel_endpoint)
        self._settings = settings
        api = replace(api_settings(settings), tracing=self._tracing)
        self._state = open_state(settings, api.api_keys)
        model, vocabulary = model_and_vocabulary(settings)
        self.service = ClusterService(
            model,
            vocabulary,
            directory,
            key,
            ClusterSettings(drain_seconds=settings.drain_timeout, pulls=settings.kv_remote is None),
        )
        listeners = [bind_shared(settings.host, settings.port)]
        if settings.admin_port is not None:
            listeners.append(bind_shared(settings.admin_host, settings.admin_port))
        app = create_app(self.service, replace(api, admin_port=settings.admin_port), state=self._state)
        app.include_router(cluster_routes(self.service))
        app.state.gateway.live.add("cluster", lambda: picture(self.service))
        options = ServerOptions(settings.ssl_cert_file, settings.ssl_key_file, settings.log_level)
        listening = threading.Event()
        self._server = DrainingServer(app, options, lambda _: listening.set())
        self._loop = LoopThread("pasture-ingress")
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(listeners), self._loop.loop)
        if not listening.wait(START_SECONDS):
            raise EngineError("the ingress does not listen")
        settle()

    def check(self) -> None:
        """Raises EngineError when it does not serve any more."""
        if self._serving.done() or not self._loop.alive:
            raise EngineError("the ingress has ended")

    def close(self) -> None:
        """Takes nothing new; open replies may finish."""
        if not self._serving.done():
            self._loop.loop.call_soon_threadsafe(self._server.stop)
            try:
                self._serving.result(self._settings.drain_timeout + 1.0)
            except TimeoutError:
                log.warning("open replies were cut off: they took longer than %g s", self._settings.drain_timeout)
        self.service.close()
        self._loop.stop()
        self._state.close()
        self._tracing.close()

    async def _serve(self, listeners: list[socket.socket]) -> None:
        self.service.start()
        keep_sweeping(self._state, self.service, self._settings)
        await self._server.serve(sockets=listeners)


def model_and_vocabulary(settings: Settings) -> tuple[ModelInfo, Vocabulary]:
    """What an ingress needs of the model. Raises ModelError."""
    if settings.fake_engine:
        engine = start_engine(settings)
        assert isinstance(engine, FakeEngine)
        return engine.model, engine.vocabulary
    from pasture.engine.vocabulary_only import load_vocabulary
    from pasture.server import probe

    model = probe(settings)
    return model, load_vocabulary(model.path)


def bind_shared(host: str, port: int) -> socket.socket:
    """A listening socket on a port that others of this user may listen on too. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
