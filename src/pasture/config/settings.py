"""Every setting, declared once: type, default, help, flags, group.

A field's name is its TOML key and, in capitals behind `PASTURE_`, its environment variable; its `Flag` says how the command
line spells it (as llama.cpp does, where llama.cpp has it). `Settings` is immutable and holds values only: where a value came
from is `pasture.config.sources`' business, and what it does is the business of the room that receives it. Optional values are
None where pasture decides by itself; the help says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from pasture.config.remote import parse_remote
from pasture.config.units import parse_bytes, parse_seconds

ENV_PREFIX = "PASTURE_"

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Flag:
    """How the command line spells a setting; `group` is its heading in `--help` and in the documentation."""

    names: tuple[str, ...]
    group: str
    metavar: str = ""
    off: str | None = None
    """the flag that says no, for switches"""
    hidden: bool = False
    secret: bool = False
    """never printed"""


def _comma_separated(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _all_layers(value: object) -> object:
    """llama.cpp's spellings of every layer; None here."""
    return None if str(value).lower() in ("all", "auto", "-1") else value


def _numbers(value: object) -> object:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _switch(value: object) -> object:
    """llama.cpp's spellings of on and off, for a setting that also knows `auto`."""
    spellings = {"1": "on", "true": "on", "0": "off", "false": "off", "-1": "auto", "yes": "on", "no": "off"}
    return spellings.get(str(value).lower(), str(value).lower())


def _remote(value: str | None) -> str | None:
    if value is not None:
        parse_remote(value)
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_separated)]
Layers = Annotated[int | None, BeforeValidator(_all_layers)]
Shares = Annotated[tuple[float, ...], NoDecode, BeforeValidator(_numbers)]
Remote = Annotated[str | None, AfterValidator(_remote)]
Compress = Literal["auto", "off", "lossless", "q8_0", "q4_0"]
Policy = Literal["foresight", "lru", "s3fifo"]
OnOffAuto = Annotated[Literal["on", "off", "auto"], BeforeValidator(_switch)]

MODEL, CACHE, STORE, SCHEDULING, SPEED = "Model", "Shared KV cache", "Resting conversations", "Scheduling", "Speed"
TENANTS = "Tenants and sessions"
SAMPLING, SERVER = "Sampling, where a request does not say", "Server"


class Settings(BaseSettings):
    """All settings of one pasture server, validated and frozen."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[str | None, Flag(("-m", "--model"), MODEL, "FILE")] = Field(
        default=None, description="The GGUF file to serve."
    )
    alias: Annotated[str | None, Flag(("-a", "--alias"), MODEL, "NAME")] = Field(
        default=None, description="The model's name in the API; the file's name without .gguf unless given."
    )
    chat_template: Annotated[str | None, Flag(("--chat-template",), MODEL, "JINJA")] = Field(
        default=None, description="A Jinja chat template instead of the model's own."
    )
    chat_template_file: Annotated[str | None, Flag(("--chat-template-file",), MODEL, "FILE")] = Field(
        default=None, description="A file with that template."
    )
    n_gpu_layers: Annotated[Layers, Flag(("-ngl", "--n-gpu-layers"), MODEL, "N")] = Field(
        default=None, ge=0, description="Layers to put on the GPU, where llama.cpp was built for one; all unless given."
    )
    main_gpu: Annotated[int, Flag(("-mg", "--main-gpu"), MODEL, "N")] = Field(
        default=0, ge=0, description="The GPU for what is not split over several."
    )
    tensor_split: Annotated[Shares, Flag(("-ts", "--tensor-split"), MODEL, "A,B,..")] = Field(
        default=(), description="Each GPU's share of the model, as proportions."
    )
    weights: Annotated[Literal["auto", "file", "f16", "bf16"], Flag(("--weights",), MODEL, "WEIGHTS")] = Field(
        default="auto",
        description="The weights to compute with: file (as they are), f16 or bf16 (a copy written out, two bytes each) or auto "
        "(what carries more people on a CPU).",
    )
    mmap: Annotated[bool, Flag(("--mmap",), MODEL, off="--no-mmap")] = Field(
        default=True, description="Map the model file into memory instead of reading it."
    )
    mlock: Annotated[bool, Flag(("--mlock",), MODEL, off="--no-mlock")] = Field(
        default=False, description="Keep the model in RAM: never let it be paged out."
    )
    self_check: Annotated[bool, Flag(("--self-check",), MODEL, off="--no-self-check")] = Field(
        default=True, description="Try the settings in a child process first, and turn off what crashes there."
    )
    fake_engine: Annotated[bool, Flag(("--fake-engine",), MODEL, hidden=True)] = Field(
        default=False, description="Serve without a model, from an engine that invents tokens at once: measures HTTP alone."
    )

    fake_pace: Annotated[Shares, Flag(("--fake-pace",), MODEL, "STEP,TOKEN", hidden=True)] = Field(
        default=(), max_length=2, description="Seconds that a step, and a token of a prompt, take that engine."
    )

    kv_cells: Annotated[int | None, Flag(("-c", "--kv-cells", "--ctx-size"), CACHE, "N")] = Field(
        default=None,
        ge=64,
        description="Tokens the shared cache holds, all users together; unless given, what fits in free memory up to 32768.",
    )
    kv_memory: Annotated[Bytes | None, Flag(("--kv-memory",), CACHE, "SIZE")] = Field(
        default=None, description="The shared cache's size in bytes (2GiB) instead of tokens."
    )
    kv_annex: Annotated[int | None, Flag(("--kv-annex",), CACHE, "N")] = Field(
        default=None,
        ge=0,
        description="Tokens of a second, small cache in which CPUs compute prompts once the shared one is so full that it "
        "slows them down; a quarter of it, up to 4096, unless given. 0 turns it off.",
    )
    share_prefix: Annotated[bool, Flag(("--share-prefix",), CACHE, off="--no-share-prefix")] = Field(
        default=True, description="Let conversations share the tokens that their prompts have in common."
    )
    kv_layout: Annotated[Literal["auto", "unified", "streams"], Flag(("--kv-layout",), CACHE, "LAYOUT")] = Field(
        default="auto",
        description="unified (shared cells exist once), streams (one buffer a conversation) or auto (follows the traffic).",
    )
    cache_type_k: Annotated[CacheType, Flag(("-ctk", "--cache-type-k"), CACHE, "TYPE")] = Field(
        default="f16", description=f"Number format of the cached keys: {' '.join(get_args(CacheType))}."
    )
    cache_type_v: Annotated[CacheType, Flag(("-ctv", "--cache-type-v"), CACHE, "TYPE")] = Field(
        default="f16", description="Number format of the cached values; the quantised ones need flash attention."
    )

    kv_ram: Annotated[Bytes | None, Flag(("--kv-ram",), STORE, "SIZE")] = Field(
        default=None,
        description="RAM for conversations that rest; a quarter of what is free, up to 4GiB, unless given. 0 turns it off.",
    )
    kv_cache: Annotated[str | None, Flag(("--kv-cache",), STORE, "DIR")] = Field(
        default=None, description="A directory that keeps conversations over restarts; several servers may share it."
    )
    kv_disk: Annotated[Bytes, Flag(("--kv-disk",), STORE, "SIZE")] = Field(
        default=50 << 30, description="How large that directory may grow."
    )
    kv_key_file: Annotated[str | None, Flag(("--kv-key-file",), STORE, "FILE")] = Field(
        default=None,
        description="A secret of 32 bytes under which blocks are encrypted on disk and on other machines (AES-256-GCM).",
    )
    kv_remote: Annotated[Remote, Flag(("--kv-remote",), STORE, "URL", secret=True)] = Field(
        default=None,
        description="A store that several servers share: redis://HOST,.., rediss://HOST,.. or mooncake://MASTER.",
    )
    kv_compress: Annotated[Compress, Flag(("--kv-compress",), STORE, "FORM")] = Field(
        default="auto",
        description="auto (smaller as memory gets short, the live cache too), off, or one form for all that rests: "
        "lossless, q8_0, q4_0.",
    )
    kv_quality: Annotated[float, Flag(("--kv-quality",), STORE, "KL")] = Field(
        default=0.01, ge=0, description="How far auto may take the answers from the exact ones (KL divergence; 0: not at all)."
    )
    kv_policy: Annotated[Policy, Flag(("--kv-policy",), STORE, "POLICY")] = Field(
        default="lru",
        description="What leaves RAM first: lru (the longest unused), foresight (the least expected saving) or s3fifo.",
    )
    kv_expire: Annotated[Seconds | None, Flag(("--kv-expire",), STORE, "TIME")] = Field(
        default=None, description="Drop KV that nobody has used for so long; as --session-idle unless given."
    )
    prefetch: Annotated[bool, Flag(("--prefetch",), STORE, off="--no-prefetch")] = Field(
        default=True,
        description="With foresight, bring conversations from disk into RAM shortly before they are expected to go on.",
    )
    idle_live: Annotated[Seconds, Flag(("--idle-live",), STORE, "TIME")] = Field(
        default=5.0, description="How long an idle conversation stays in the live cache before it rests in RAM alone."
    )

    max_running: Annotated[int, Flag(("-np", "--max-running", "--parallel"), SCHEDULING, "N")] = Field(
        default=64, ge=1, le=254, description="Requests that generate at the same time; the others wait their turn."
    )
    max_queue: Annotated[int, Flag(("--max-queue",), SCHEDULING, "N")] = Field(
        default=512, ge=1, description="Requests that may wait; the next one is told to come back later (429)."
    )
    itl_target: Annotated[Seconds, Flag(("--itl-target",), SCHEDULING, "TIME")] = Field(
        default=0.4, description="The gap between two tokens of a stream that other people's long prompts may cause."
    )
    timeout: Annotated[Seconds | None, Flag(("--timeout",), SCHEDULING, "TIME")] = Field(
        default=None,
        description="A request's time limit from arrival to last token, unless it names its own; no limit unless given.",
    )

    drain_timeout: Annotated[Seconds, Flag(("--drain-timeout",), SCHEDULING, "TIME")] = Field(
        default=60.0, description="How long running requests may go on after the server was told to end."
    )

    threads: Annotated[int | None, Flag(("-t", "--threads"), SPEED, "N")] = Field(
        default=None, ge=1, description="CPU threads for generation; the cores this process may run on unless given."
    )
    threads_batch: Annotated[int | None, Flag(("-tb", "--threads-batch"), SPEED, "N")] = Field(
        default=None, ge=1, description="CPU threads for prompts; the same as --threads unless given."
    )
    batch_size: Annotated[int, Flag(("-b", "--batch-size"), SPEED, "N")] = Field(
        default=2048, ge=1, description="Tokens in one engine step at most."
    )
    ubatch_size: Annotated[int, Flag(("-ub", "--ubatch-size"), SPEED, "N")] = Field(
        default=512, ge=1, description="Tokens that the model computes in one go within a step."
    )
    flash_attn: Annotated[OnOffAuto, Flag(("-fa", "--flash-attn"), SPEED, "on|off|auto")] = Field(
        default="on",
        description="Flash attention; -fa alone means on, and so does auto. Sharing needs it.",
    )

    temperature: Annotated[float, Flag(("--temp", "--temperature"), SAMPLING, "T")] = Field(
        default=0.8, ge=0, description="0 takes the most probable token every time."
    )
    top_k: Annotated[int, Flag(("--top-k",), SAMPLING, "N")] = Field(
        default=40, ge=0, description="Draw from the N most probable tokens; 0 from all."
    )
    top_p: Annotated[float, Flag(("--top-p",), SAMPLING, "P")] = Field(
        default=0.95, gt=0, le=1, description="Draw from the most probable tokens that add up to P."
    )
    min_p: Annotated[float, Flag(("--min-p",), SAMPLING, "P")] = Field(
        default=0.05, ge=0, le=1, description="Leave out tokens less than P times as probable as the best."
    )
    repeat_penalty: Annotated[float, Flag(("--repeat-penalty",), SAMPLING, "X")] = Field(
        default=1.0, gt=0, description="Make tokens that came before less probable; 1 does nothing."
    )

    state: Annotated[str | None, Flag(("--state",), TENANTS, "FILE")] = Field(
        default=None,
        description="A SQLite file (or a postgresql:// URL) that keeps keys, sessions and transcripts; in memory unless given.",
    )
    share: Annotated[Literal["tenant", "all"], Flag(("--share",), TENANTS, "WITH")] = Field(
        default="tenant", description="Who shares prompts: those with keys of one tenant, or all, as one trusting team."
    )
    session_idle: Annotated[Seconds, Flag(("--session-idle",), TENANTS, "TIME")] = Field(
        default=604_800.0, description="How long a session or a stored response is kept after its last use."
    )
    session_lifetime: Annotated[Seconds, Flag(("--session-lifetime",), TENANTS, "TIME")] = Field(
        default=2_592_000.0, description="How long it is kept in all."
    )
    admin_key: Annotated[str | None, Flag(("--admin-key",), TENANTS, "KEY", secret=True)] = Field(
        default=None,
        min_length=1,
        description="A key for what shows everybody's doing (/metrics, /slots, /v1/admin); safer in the environment.",
    )
    admin_port: Annotated[int | None, Flag(("--admin-port",), TENANTS, "PORT")] = Field(
        default=None, ge=0, lt=65536, description="Serve that on a port of its own, and nowhere else; needs the admin key."
    )
    admin_host: Annotated[str, Flag(("--admin-host",), TENANTS, "HOST")] = Field(
        default="127.0.0.1", description="The address of the admin port."
    )
    peer: Annotated[Texts, Flag(("--peer",), TENANTS, "NAME=URL,..")] = Field(
        default=(), description="Other pasture servers that sessions may be copied and moved to, by name."
    )
    peer_key_file: Annotated[str | None, Flag(("--peer-key-file",), TENANTS, "FILE")] = Field(
        default=None, description="Keys at these peers, for clients that bring none of their own: lines of NAME=KEY."
    )

    turn_ahead: Annotated[bool, Flag(("--turn-ahead",), SERVER, off="--no-turn-ahead")] = Field(
        default=True,
        description="Compute a conversation as its next turn will show it (reasoning stripped, ...) while nobody asks.",
    )
    host: Annotated[str, Flag(("--host",), SERVER, "ADDRESS")] = Field(
        default="127.0.0.1", description="The address to listen on; 0.0.0.0 is every interface."
    )
    port: Annotated[int, Flag(("--port",), SERVER, "N")] = Field(
        default=8080, ge=0, le=65535, description="The port; 0 takes a free one."
    )
    api_key: Annotated[Texts, Flag(("--api-key",), SERVER, "KEY", secret=True)] = Field(
        default=(),
        description="A key that clients must send, or several, separated by commas; safer in the environment or a file.",
    )
    api_key_file: Annotated[str | None, Flag(("--api-key-file",), SERVER, "FILE")] = Field(
        default=None, description="A file with one key a line."
    )
    max_body: Annotated[Bytes, Flag(("--max-body",), SERVER, "SIZE")] = Field(
        default=32 << 20, gt=0, description="The largest request body."
    )
    cors_origins: Annotated[Texts, Flag(("--cors-origins",), SERVER, "URL,..")] = Field(
        default=(), description="Web pages that may call this server from a browser; * is every page."
    )
    ssl_key_file: Annotated[str | None, Flag(("--ssl-key-file",), SERVER, "FILE")] = Field(
        default=None, description="The TLS private key (PEM); with --ssl-cert-file, pasture speaks HTTPS."
    )
    ssl_cert_file: Annotated[str | None, Flag(("--ssl-cert-file",), SERVER, "FILE")] = Field(
        default=None, description="The TLS certificate (PEM)."
    )
    log_level: Annotated[LogLevel, Flag(("--log-level",), SERVER, "LEVEL")] = Field(
        default="info", description="How much the server says on stderr: debug, info, warning or error."
    )
    log_format: Annotated[Literal["text", "json"], Flag(("--log-format",), SERVER, "text|json")] = Field(
        default="text", description="text for people, or json: an object a line, and a line for each answered request."
    )
    otel_endpoint: Annotated[str | None, Flag(("--otel-endpoint",), SERVER, "URL")] = Field(
        default=None, description="An OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `load_configuration` reads the sources itself, because it must know which one won."""
        return (init_settings,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kv_cells is not None and self.kv_memory is not None:
            raise ValueError("kv_cells and kv_memory both size the cache: give one of them")
        if (self.ssl_key_file is None) != (self.ssl_cert_file is None):
            raise ValueError("ssl_key_file and ssl_cert_file go together: HTTPS needs both")
        for name in ("kv_cache", "kv_remote"):
            if getattr(self, name) is not None and self.kv_ram == 0:
                raise ValueError(f"{name} is written through RAM: give kv_ram some room, 256MiB at least is sensible")
        if self.kv_key_file is not None and self.kv_cache is None and self.kv_remote is None:
            raise ValueError("kv_key_file encrypts what is in kv_cache and kv_remote: give one of them too")
        if self.admin_port is not None and self.admin_key is None:
            raise ValueError("admin_port serves what the admin key opens: give admin_key too")
        if self.peer_key_file is not None and not self.peer:
            raise ValueError("peer_key_file holds keys at peers: give peer too")
        if self.chat_template is not None and self.chat_template_file is not None:
            raise ValueError("chat_template and chat_template_file are the same thing: give one of them")
        if self.batch_size < self.max_running:
            raise ValueError(
                f"batch_size={self.batch_size}: a step has a token of each stream, and max_running={self.max_running} of them "
                "may run: raise batch_size, or lower max_running"
            )
        if self.flash_attn == "off" and self.cache_type_v not in ("f32", "f16", "bf16"):
            raise ValueError(
                f"cache_type_v={self.cache_type_v} needs flash attention: set flash_attn to on, or cache_type_v to f16"
            )
        return self


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """One setting as the command line, the documentation and `pasture config` see it."""

    name: str
    flag: Flag
    default: object
    help: str
    is_switch: bool

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def long_flag(self) -> str:
        """The spelling used in messages."""
        return next(name for name in self.flag.names if name.startswith("--"))


@cache
def setting_specs() -> Mapping[str, SettingSpec]:
    """Every setting by name, in the order of declaration."""
    return {name: _spec(name, info) for name, info in Settings.model_fields.items()}


def _spec(name: str, info: FieldInfo) -> SettingSpec:
    [flag] = (item for item in info.metadata if isinstance(item, Flag))
    return SettingSpec(name, flag, info.default, info.description or "", is_switch=info.annotation is bool)
