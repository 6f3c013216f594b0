"""What a benchmark is asked to do, and the small languages its flags are written in.

Owns BenchOptions (what the command line fills), service levels (`ttft_p95=4s,itl_p95=400ms`) and the parsing of `--against`.
Knows nothing of processes, clients or reports. Pure values; any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pasture.core.errors import ConfigError
from pasture.core.values import Form, Weights

LEVEL_NAMES = (
    "ttft_mean",
    "ttft_p50",
    "ttft_p95",
    "latency_mean",
    "latency_p95",
    "itl_p50",
    "itl_p95",
    "itl_max",
    "wall",
)
"""figures that a service level may limit; each is `<name>_seconds` of `measure.Figures`"""

_LIMIT = re.compile(r"(?P<name>[a-z0-9_]+)\s*(?:<=|=|<)\s*(?P<number>[0-9.]+)\s*(?P<unit>ms|s)")


class WorkloadName(StrEnum):
    TEAM = "team"
    DOCS = "docs"
    PRIVATE = "private"
    AGENTS = "agents"
    CROWDED = "crowded"
    TRACE = "trace"


class Rest(StrEnum):
    """Where idle conversations are, for `idle`."""

    RAM = "ram"
    DISK = "disk"


class Arrivals(StrEnum):
    SIMULTANEOUS = "simultaneous"
    """everybody asks in the same instant: the worst case for sharing"""
    STAGGERED = "staggered"
    """users come one after another, a seeded second apart on average"""


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure's upper bound within a service level."""

    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} <= {self.seconds:g} s"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Everything `pasture bench` can be told; a field is a flag of the same name unless its comment says otherwise."""

    workload: WorkloadName = WorkloadName.TEAM
    """positional: team, docs, private, agents, crowded or trace"""
    users: int | None = None
    """--users: people at once; for agents the branches a step. None: the workload's own (16; agents 8)"""
    turns: int | None = None
    """--turns: questions each; for agents the steps. None: 3"""
    seed: int = 1
    """--seed: of questions, documents, arrivals and think times"""
    against: tuple[str, ...] = ()
    """--against, repeatable and comma-separated: isolated, llama-server, or the URL of an OpenAI-compatible server that runs
    already. `parse_against` makes the tuple"""
    repeat: int = 1
    """--repeat: runs of each system, in alternation (A B A B); reported are medians over them"""
    arrivals: Arrivals = Arrivals.SIMULTANEOUS
    """--arrivals: simultaneous or staggered"""
    max_tokens: int = 32
    """--max-tokens: length of every reply, the same for every system (end-of-generation tokens are ignored)"""
    cells: int = 32768
    """-c / --kv-cells: KV cells that each system gets in total"""
    model: Path | None = None
    """-m / --model: GGUF file. None: the small model of the `demo` extra"""
    peer_model: Path | None = None
    """--peer-model: GGUF file of the peers that are started. None: the same; for `isolated` what pasture makes of it"""
    threads: int | None = None
    """-t / --threads of every system. None: the number of physical cores"""
    think_time: float = 0.0
    """--think-time: mean seconds between a reply and the next question (seeded, exponential)"""
    slo: tuple[Limit, ...] = ()
    """--slo "ttft_p95=4s,itl_p95=400ms": also find the largest number of users inside these limits. `parse_slo` makes the
    tuple"""
    slo_max_users: int = 64
    """--slo-max-users: where the search for users ends"""
    equal_memory: bool = False
    """--memory: also report each system's peak memory when it gets just the cells that the workload needs"""
    out: Path | None = None
    """--out DIR: result.json, report.html and the systems' logs. None: a table in the terminal only"""
    serve_flags: tuple[str, ...] = ()
    """everything after `--`: handed to `pasture serve` as it stands"""
    llama_server: Path | None = None
    """--llama-server: the binary. None: $PASTURE_LLAMA_SERVER, then the path, then the cache folder"""
    api_key: str | None = None
    """--api-key: sent to the URLs in `against`"""
    request_timeout: float = 600.0
    """--request-timeout: seconds after which a request counts as an error"""
    seconds: float = 5.0
    """--seconds: how long `bench overhead` streams from the fake engine"""
    texts: int = 4
    """--texts: what `quality` measures on, of 512 tokens of context and 256 held tokens each"""
    weights: Weights = Weights.AUTO
    """--weights: what `quality` computes with"""
    conversations: int = 2000
    """--conversations that `idle` lets rest"""
    rest: Rest = Rest.RAM
    """--rest: ram or disk, for `idle`"""
    form: Form = Form.Q8_0
    """--form in which they rest: raw, lossless, q8_0 or q4_0, for `idle`"""
    trace: Path | None = None
    """positional, behind `trace`: a file in Mooncake's format, or of coding sessions"""
    scale: float = 1 / 32
    """--scale: tokens of a recorded prompt or reply that are played, as a share"""
    speed: float = 0.25
    """--speed: how many times as fast as recorded"""
    requests: int = 100
    """--requests: so many from the beginning of the trace"""
    session_every: float = 60.0
    """--session-every: seconds between the beginnings of two recorded coding sessions"""
    sessions: int = 200
    """--sessions that `returning` keeps"""
    think: float = 10.0
    """--think: median seconds between a reply and the next question, for `returning`"""
    spread: float = 2.4
    """--think-spread: standard deviation of the logarithms of those seconds; 2.4 has 5 % of them above 500 s, as recorded
    coding sessions have, whose median is 10 s too"""
    ram_for: int = 40
    """--ram-for: sessions that `returning` leaves room for in RAM"""
    context: int = 256
    """--context: tokens of each session of `returning`"""
    period: float = 180.0
    """--period: seconds that a run of `returning` goes on"""
    hints: bool = True
    """--hints/--no-hints: whether users of `returning` send what a chat front end sends while they type"""
    as_json: bool = False
    """--json instead of a table, for the benchmarks without report.html"""
    wait: bool = True
    """--wait/--no-wait: whether `demo` keeps its server up at the end"""

    def __post_init__(self) -> None:
        counts = ["repeat", "max_tokens", "cells", "slo_max_users", "texts", "conversations"]
        counts += ["sessions", "ram_for", "context", "requests"]
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
        for name, value in (("users", self.users), ("turns", self.turns), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1")
        if self.think_time < 0 or self.spread < 0:
            raise ConfigError("--think-time and --think-spread must not be negative")
        for name in ("think", "period", "scale", "speed"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name} must be more than nothing")
        if self.session_every < 0:
            raise ConfigError("--session-every must not be negative")


def parse_slo(text: str) -> tuple[Limit, ...]:
    """Limits of a service level: `ttft_p95=4s,itl_p95=400ms`. Raises ConfigError with the names that exist."""
    limits = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _LIMIT.fullmatch(part)
        if match is None or match["name"] not in LEVEL_NAMES or match["number"].count(".") > 1:
            raise ConfigError(
                f"--slo: cannot read {part!r}; write NAME=4s or NAME=400ms with NAME one of {', '.join(LEVEL_NAMES)}"
            )
        limits.append(Limit(match["name"], float(match["number"]) * (0.001 if match["unit"] == "ms" else 1.0)))
    return tuple(limits)


def parse_share(text: str | float) -> float:
    """A number written as `0.25` or `1/32`. Raises ValueError."""
    above, _, below = str(text).partition("/")
    try:
        return float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number such as 0.25 or 1/32") from None


def parse_against(values: Iterable[str]) -> tuple[str, ...]:
    """Peers in the order given, each once. Raises ConfigError for a word that is neither a peer nor a URL."""
    peers: list[str] = []
    for name in (piece.strip() for value in values for piece in value.split(",")):
        if not name or name in peers:
            continue
        if name not in ("isolated", "llama-server") and not name.startswith(("http://", "https://")):
            raise ConfigError(
                f"--against: {name!r} is neither isolated, llama-server nor a URL that begins with http:// or https://"
            )
        peers.append(name)
    return tuple(peers)
