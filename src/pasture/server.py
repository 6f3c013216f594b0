"""The composition root: settings in, a running service or server out.

The one place that knows every room: it translates `Settings` into each room's own settings, sizes the pool, and starts engine,
scheduler and HTTP in that order. What goes wrong on the way is a PastureError with a sentence for the person who started it.
`start_service` belongs to the thread that calls it; `serve` blocks until the server is told to end.
"""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from pasture.api import ApiSettings, create_app, run
from pasture.api.peers import parse_keys, parse_peers
from pasture.api.server import bind
from pasture.api.tracing import open_tracing
from pasture.config import Settings, format_bytes
from pasture.core.errors import ConfigError
from pasture.core.ports import Engine, Service
from pasture.core.storage import Store
from pasture.core.values import Form, Layout, ModelInfo, Namespace, PoolShape, SamplingParams, Weights
from pasture.engine import EngineSettings, OnProgress, open_engine, probe_model
from pasture.engine.device import plan_pool
from pasture.engine.fake import FakeEngine
from pasture.engine.gguf_header import read_header
from pasture.engine.memory import MemoryPlan, available_bytes, check_fits
from pasture.engine.paced import Pace, PacedEngine
from pasture.scheduler.service import LocalService
from pasture.scheduler.settings import LayoutChoice, SchedulerSettings
from pasture.sessions.state import SWEEP_SECONDS, State
from pasture.sessions.values import Limits, Share
from pasture.stores import Watch, allowed_forms, store_for, unwatched

log = logging.getLogger(__name__)

MAX_SEQUENCES = 256
"""of llama.cpp; pasture asks for two a running request, so that idle conversations stay, and not for all: each costs logits"""

DEFAULT_CELLS = 32768
FREE_SHARE = 0.8
"""of the largest cache that fits, at most so much unless somebody said how much"""

SWEEPS = 8
"""for what has expired, in the time after which it does"""

CELLS_ALIGNMENT = 256
"""llama.cpp rounds a cache up to a multiple of this"""
ANNEX_SHARE = 4
"""the annex has one cell for so many of the pool"""
LEAST_ANNEX_CELLS, MOST_ANNEX_CELLS = 1024, 4096
"""up to so many tokens of a conversation are computed in it"""

MIN_STREAM_CELLS = 2048
"""the shortest conversation that the streams layout should still hold at start"""


Prepare = Callable[[Engine, Store], None]


def start_service(settings: Settings, on_loading: OnProgress | None = None) -> Service:
    """Load the model and start its scheduler; ready when it returns. The caller closes it. `on_loading`: see `start_engine`."""
    return service_over(start_engine(settings, on_loading), settings)


def service_over(
    engine: Engine,
    settings: Settings,
    prepare: Prepare = lambda engine, store: None,
    watch: Watch = unwatched,
) -> LocalService:
    """A service with this engine, which is its own from here on. `prepare` may use engine and store before it starts.

    `watch` wraps the policy of the RAM tier, which hears what enters and leaves it.
    """
    try:
        store = store_for(settings, engine.codec, engine.model, available_bytes, watch)
        try:
            prepare(engine, store)
        except BaseException:
            store.close()
            raise
    except BaseException:
        engine.close()
        raise
    return LocalService(engine, store, scheduler_settings(settings))


def serve(settings: Settings, on_started: Callable[[str, Service], None], on_loading: OnProgress | None = None) -> None:
    """Serve HTTP until SIGINT or SIGTERM; what runs then may finish. `on_started` gets the URL once the server listens.

    `on_loading`: see `start_engine`.

    Whatever can be wrong without the model is found out before the model is loaded; who connects meanwhile waits.
    """
    api = api_settings(settings)
    for name in ("ssl_cert_file", "ssl_key_file"):
        if file := getattr(settings, name):
            _read(file, name)
    with (
        closing(bind(settings.host, settings.port)) as listener,
        _admin_listener(settings) as admin,
        closing(open_state(settings, api.api_keys)) as state,
        closing(open_tracing(settings.otel_endpoint)) as tracing,
        closing(start_service(settings, on_loading)) as service,
    ):
        api = replace(api, tracing=tracing)
        settle()
        keep_sweeping(state, service, settings)
        run(
            create_app(service, replace(api, admin_port=None if admin is None else admin.getsockname()[1]), state=state),
            ssl_cert_file=settings.ssl_cert_file,
            ssl_key_file=settings.ssl_key_file,
            log_level=settings.log_level,
            sockets=[listener, *([] if admin is None else [admin])],
            on_started=lambda url: on_started(url, service),
        )


def settle() -> None:
    """What was loaded until now stays until the end: nothing looks through it again, least of all while the process ends."""
    gc.collect()
    gc.freeze()


@contextmanager
def _admin_listener(settings: Settings) -> Iterator[socket.socket | None]:
    """The admin port, where one was asked for."""
    if settings.admin_port is None:
        yield None
        return
    with closing(bind(settings.admin_host, settings.admin_port)) as listener:
        yield listener


@contextmanager
def measuring_engine(settings: Settings, n_cells: int, n_seqs: int) -> Iterator[Engine]:
    """An engine alone, for the thread in the block, with a pool just large enough to measure on."""
    small = settings.model_copy(update={"kv_cells": n_cells, "kv_memory": None, "kv_layout": "unified", "max_running": n_seqs})
    engine = start_engine(small)
    try:
        yield engine
    finally:
        engine.close()


def probe(settings: Settings) -> ModelInfo:
    """The model as its file's header tells it. Raises ModelError for a file that is none, ConfigError when none is named."""
    if settings.model is None:
        raise ConfigError("no model: give -m FILE.gguf, or set PASTURE_MODEL, or model in pasture.toml")
    return probe_model(settings.model, type_k=settings.cache_type_k, type_v=settings.cache_type_v)


def engine_settings(settings: Settings) -> EngineSettings:
    """The engine's part, with the pool sized. Reads the model file's header and the free memory where the pool will lie."""
    model = probe(settings)
    wanted = EngineSettings(
        model_path=model.path,
        n_cells=CELLS_ALIGNMENT,
        n_seqs=min(MAX_SEQUENCES, 2 * settings.max_running),
        layout=_start_layout(settings),
        n_batch=settings.batch_size,
        n_ubatch=min(settings.ubatch_size, settings.batch_size),
        n_gpu_layers=-1 if settings.n_gpu_layers is None else settings.n_gpu_layers,
        n_threads=settings.threads,
        n_threads_batch=settings.threads_batch,
        type_k=settings.cache_type_k,
        type_v=settings.cache_type_v,
        flash_attn=settings.flash_attn != "off",
        use_mmap=settings.mmap,
        use_mlock=settings.mlock,
        weights=Weights(settings.weights),
        main_gpu=settings.main_gpu,
        tensor_split=settings.tensor_split,
        self_check=settings.self_check,
    )
    n_cells = pool_cells(settings, model, lambda: _largest_cells(model, wanted))
    n_seqs = wanted.n_seqs if wanted.layout is Layout.UNIFIED else stream_sequences(wanted.n_seqs, n_cells)
    return replace(wanted, n_cells=n_cells, n_seqs=n_seqs, annex_cells=_annex_cells(settings, n_cells))


def planned_cells(settings: Settings) -> int:
    """Cells that `serve` would start with here. Raises DoesNotFit when it would not start."""
    wanted = engine_settings(settings)
    plan = _memory_plan(probe(settings), wanted)
    if plan is not None:
        check_fits(plan, wanted.n_cells)
    return wanted.n_cells


def pool_cells(settings: Settings, model: ModelInfo, largest: Callable[[], int | None]) -> int:
    """Cells of the pool: as many as were asked for, as `kv_memory` buys, or as reason and the `largest` that fits allow.

    `largest` is asked when nobody else has said; None when it is not known.
    """
    if settings.kv_cells is not None:
        return settings.kv_cells
    if settings.kv_memory is None:
        fitting = largest()
        if fitting is None:
            log.warning(
                "the GPU does not say how much of its memory is free: -c or --kv-memory size the cache better than we can"
            )
            return DEFAULT_CELLS
        return max(CELLS_ALIGNMENT, min(DEFAULT_CELLS, _aligned(int(fitting * FREE_SHARE))))
    if model.cell_bytes == 0:
        raise ConfigError(f"kv_memory: {model.architecture} keeps no KV a token, so bytes cannot size its cache: use kv_cells")
    n_cells = _aligned(settings.kv_memory // model.cell_bytes)
    if n_cells == 0:
        least = format_bytes(CELLS_ALIGNMENT * model.cell_bytes)
        raise ConfigError(f"kv_memory is too small: a token takes {format_bytes(model.cell_bytes)}, the least is {least}")
    return n_cells


def open_state(settings: Settings, keys: Sequence[str] = ()) -> State:
    """Tenants and sessions, where the settings say that they are kept. The caller closes it."""
    limits = Limits(idle_seconds=settings.session_idle, lifetime_seconds=settings.session_lifetime)
    return State(settings.state, keys=keys, share=Share(settings.share), limits=limits)


def keep_sweeping(state: State, service: Service, settings: Settings) -> None:
    """Have what is due forgotten while the server runs: rows by the state, KV by the service."""
    longest = settings.kv_expire

    def keep_kv(seconds: Mapping[Namespace, float]) -> None:
        service.keep_for(seconds if longest is None else {name: min(own, longest) for name, own in seconds.items()})

    state.keep_sweeping(keep_kv, min(SWEEP_SECONDS, settings.session_idle / SWEEPS))


def scheduler_settings(settings: Settings) -> SchedulerSettings:
    """The scheduler's part."""
    return SchedulerSettings(
        share_prefix=settings.share_prefix,
        layout=LayoutChoice(settings.kv_layout),
        itl_target_seconds=settings.itl_target,
        max_waiting=settings.max_queue,
        max_running=settings.max_running,
        default_deadline_seconds=settings.timeout,
        drain_seconds=settings.drain_timeout,
        rehearse=True,
        shift_to=Form.Q8_0 if settings.kv_compress == "auto" and Form.Q8_0 in allowed_forms(settings) else None,
        idle_live_seconds=None if settings.kv_ram == 0 and settings.kv_cache is None else settings.idle_live,
        expire_seconds=settings.kv_expire or settings.session_idle,
    )


def api_settings(settings: Settings) -> ApiSettings:
    """HTTP's part; reads the key file and the template file."""
    return ApiSettings(
        model_alias=settings.alias or (Path(settings.model).stem if settings.model else None),
        api_keys=(*settings.api_key, *_keys(settings.api_key_file)),
        admin_key=settings.admin_key,
        cors_origins=settings.cors_origins,
        max_body_bytes=settings.max_body,
        sampling=SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
        ),
        chat_template=chat_template_of(settings),
        deadline_seconds=settings.timeout,
        turn_ahead=settings.turn_ahead,
        peers=parse_peers(settings.peer, _peer_keys(settings.peer_key_file)),
        prefetch=settings.prefetch,
        log_level=settings.log_level,
    )


def chat_template_of(settings: Settings) -> str | None:
    """The template that replaces the model's own, if one was given."""
    if settings.chat_template_file is not None:
        return _read(settings.chat_template_file, "chat_template_file")
    return settings.chat_template


def start_engine(settings: Settings, on_loading: OnProgress | None = None) -> Engine:
    """The engine that the settings ask for; the calling thread's until it is given away.

    `on_loading` hears the share of the model that is read, 0 to 1.
    """
    if not settings.fake_engine:
        return open_engine(engine_settings(settings), on_loading)
    n_cells = settings.kv_cells or DEFAULT_CELLS
    n_seqs = min(MAX_SEQUENCES, 2 * settings.max_running)
    if _start_layout(settings) is Layout.STREAMS:
        n_seqs = stream_sequences(n_seqs, n_cells)
    shape = PoolShape(n_cells, n_seqs, _start_layout(settings), settings.batch_size)
    return PacedEngine(shape, Pace(*settings.fake_pace)) if settings.fake_pace else FakeEngine(shape)


def _start_layout(settings: Settings) -> Layout:
    return Layout.STREAMS if settings.kv_layout == "streams" else Layout.UNIFIED


def stream_sequences(wanted: int, n_cells: int) -> int:
    """In the streams layout every sequence has its share of the cells, so there are only as many as can hold a conversation.

    Two at least: whoever continues an idle conversation joins it with a sequence of their own.
    """
    return max(2, min(wanted, n_cells // MIN_STREAM_CELLS))


def _memory_plan(model: ModelInfo, wanted: EngineSettings) -> MemoryPlan | None:
    return plan_pool(model, wanted, n_embd=read_header(model.path).number("embedding_length"))


def _largest_cells(model: ModelInfo, wanted: EngineSettings) -> int | None:
    plan = _memory_plan(model, wanted)
    return None if plan is None else plan.largest_cells


def _annex_cells(settings: Settings, n_cells: int) -> int:
    """Of the annex of such a pool; unless asked for none where it would gain nothing, or little for what it takes."""
    if settings.kv_annex is not None:
        return min(n_cells, -(-settings.kv_annex // CELLS_ALIGNMENT) * CELLS_ALIGNMENT)
    annex_cells = min(MOST_ANNEX_CELLS, _aligned(n_cells // ANNEX_SHARE))
    return annex_cells if annex_cells >= LEAST_ANNEX_CELLS and settings.kv_layout != "streams" else 0


def _aligned(n_cells: int) -> int:
    return n_cells // CELLS_ALIGNMENT * CELLS_ALIGNMENT


def _keys(file: str | None) -> tuple[str, ...]:
    if file is None:
        return ()
    lines = (line.strip() for line in _read(file, "api_key_file").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file: {file} holds no key, and a server without keys is open to everybody")
    return keys


def _peer_keys(file: str | None) -> dict[str, str]:
    return {} if file is None else parse_keys(_read(file, "peer_key_file"))


def _read(file: str, setting: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
