"""`pasture bench WORKLOAD` and `pasture demo`: thin wrappers around `pasture.bench`, which does the measuring.

What needs more than a server's public side to be measured (stored forms, thousands of idle conversations, an engine that is
too fast) is put together in `pasture.cli` and measured through the ports of `pasture.core`. A flag is declared once, under the
name of its field in BenchOptions, whose default is the flag's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, cast

import typer

from pasture.bench.options import Arrivals, BenchOptions, Rest, WorkloadName, parse_against, parse_share, parse_slo
from pasture.config.units import parse_seconds
from pasture.core.errors import ConfigError
from pasture.core.values import Form, Weights

LOAD, SYSTEMS, OUTPUT = "The load", "The systems", "The answer"
_EXTRA = {"plotly"}
"""packages of the `bench` extra"""


class Benchmark(StrEnum):
    """What `pasture bench` can run: the workloads, what pasture itself costs, and what its tiers bring."""

    TEAM = "team"
    DOCS = "docs"
    PRIVATE = "private"
    AGENTS = "agents"
    CROWDED = "crowded"
    TRACE = "trace"
    OVERHEAD = "overhead"
    QUALITY = "quality"
    SHIFT = "shift"
    RESTART = "restart"
    IMPORT = "import"
    REMOTE = "remote"
    SOAK = "soak"
    TIMING = "timing"
    IDLE = "idle"
    TIERS = "tiers"
    NEIGHBOURS = "neighbours"
    FORKS = "forks"
    FORESIGHT = "foresight"
    RETURNING = "returning"
    TURN_AHEAD = "turn-ahead"


_MODULES = {
    Benchmark.OVERHEAD: "pasture.bench.overhead",
    Benchmark.QUALITY: "pasture.cli.quality",
    Benchmark.SHIFT: "pasture.cli.shift",
    Benchmark.RESTART: "pasture.bench.restart",
    Benchmark.IMPORT: "pasture.bench.importing",
    Benchmark.REMOTE: "pasture.bench.remote",
    Benchmark.SOAK: "pasture.bench.soak",
    Benchmark.TIMING: "pasture.bench.timing",
    Benchmark.IDLE: "pasture.cli.idle",
    Benchmark.TIERS: "pasture.cli.tiers",
    Benchmark.NEIGHBOURS: "pasture.bench.neighbours",
    Benchmark.FORKS: "pasture.bench.forks",
    Benchmark.FORESIGHT: "pasture.bench.foresight",
    Benchmark.RETURNING: "pasture.bench.returning",
    Benchmark.TURN_AHEAD: "pasture.bench.turn_ahead",
}
"""who measures; the workloads have one in common"""


Users = Annotated[int | None, typer.Option("--users", help="People at once (agents: branches a step).", rich_help_panel=LOAD)]
Turns = Annotated[int | None, typer.Option("--turns", help="Questions each (agents: steps).", rich_help_panel=LOAD)]
Seed = Annotated[int, typer.Option("--seed", help="Of questions, arrivals and think times.", rich_help_panel=LOAD)]
Arrive = Annotated[
    Arrivals, typer.Option("--arrivals", help="Everybody in the same instant, or in turn.", rich_help_panel=LOAD)
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Length of every reply.", rich_help_panel=LOAD)]
ThinkTime = Annotated[float, typer.Option("--think-time", help="Mean seconds before the next question.", rich_help_panel=LOAD)]
Model = Annotated[
    Path | None, typer.Option("-m", "--model", help="GGUF file; the demo's unless given.", rich_help_panel=SYSTEMS)
]
PeerModel = Annotated[
    Path | None, typer.Option("--peer-model", help="GGUF file of the peers; the same unless given.", rich_help_panel=SYSTEMS)
]
Cells = Annotated[int, typer.Option("-c", "--kv-cells", "--ctx-size", help="KV cells of each system.", rich_help_panel=SYSTEMS)]
Threads = Annotated[
    int | None,
    typer.Option("-t", "--threads", help="Of each system; the physical cores unless given.", rich_help_panel=SYSTEMS),
]
Against = Annotated[
    list[str] | None,
    typer.Option("--against", help="isolated, llama-server, or a URL; several with commas.", rich_help_panel=SYSTEMS),
]
LlamaServer = Annotated[
    Path | None, typer.Option("--llama-server", help="The program, if it is not on the path.", rich_help_panel=SYSTEMS)
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="For the URLs in --against.", rich_help_panel=SYSTEMS)]
ServeFlags = Annotated[
    list[str] | None,
    typer.Argument(metavar="FLAGS", help="Flags for `pasture serve`, behind a --.", show_default=False),
]
Repeat = Annotated[int, typer.Option("--repeat", help="Runs of each system, in alternation.", rich_help_panel=OUTPUT)]
Slo = Annotated[
    str, typer.Option("--slo", help="Also find the most users within ttft_p95=4s,itl_p95=400ms.", rich_help_panel=OUTPUT)
]
SloMax = Annotated[int, typer.Option("--slo-max-users", help="Where that search ends.", rich_help_panel=OUTPUT)]
Memory = Annotated[
    bool, typer.Option("--memory", help="Also compare memory, with just the cells needed.", rich_help_panel=OUTPUT)
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for result.json and report.html.", rich_help_panel=OUTPUT)]
RequestTimeout = Annotated[
    float, typer.Option("--request-timeout", help="Seconds until a request counts as an error.", rich_help_panel=OUTPUT)
]
Seconds = Annotated[float, typer.Option("--seconds", help="How long `overhead` streams.", rich_help_panel=OUTPUT)]
Texts = Annotated[int, typer.Option("--texts", help="Texts that `quality` measures on.", rich_help_panel=LOAD)]
WeightsForm = Annotated[
    Weights, typer.Option("--weights", help="What `quality` computes with: auto, file, f16 or bf16.", rich_help_panel=LOAD)
]
Conversations = Annotated[
    int,
    typer.Option(
        "--conversations", help="Idle ones, of 1,000 tokens each, for `idle`; sessions, for `soak`.", rich_help_panel=LOAD
    ),
]
RestForm = Annotated[Form, typer.Option("--form", help="In which form they rest, for `idle`.", rich_help_panel=LOAD)]
RestIn = Annotated[Rest, typer.Option("--rest", help="Where they rest, for `idle`.", rich_help_panel=LOAD)]
Scale = Annotated[
    float, typer.Option("--scale", parser=parse_share, metavar="SHARE", help="Of a trace's tokens: 1/32.", rich_help_panel=LOAD)
]
Speed = Annotated[
    float, typer.Option("--speed", parser=parse_share, metavar="X", help="Times as fast as a trace.", rich_help_panel=LOAD)
]
Requests = Annotated[int, typer.Option("--requests", help="From the beginning of a trace.", rich_help_panel=LOAD)]
SessionEvery = Annotated[
    float,
    typer.Option(
        "--session-every", parser=parse_seconds, metavar="TIME", help="Between recorded coding sessions.", rich_help_panel=LOAD
    ),
]
Sessions = Annotated[int, typer.Option("--sessions", help="Conversations of `returning`.", rich_help_panel=LOAD)]
Think = Annotated[
    float,
    typer.Option("--think", parser=parse_seconds, metavar="TIME", help="Median pause, for `returning`.", rich_help_panel=LOAD),
]
Spread = Annotated[
    float, typer.Option("--think-spread", help="Standard deviation of the pauses' logarithms.", rich_help_panel=LOAD)
]
RamFor = Annotated[int, typer.Option("--ram-for", help="Sessions of `returning` that fit in RAM.", rich_help_panel=LOAD)]
Context = Annotated[int, typer.Option("--context", help="Tokens of each session of `returning`.", rich_help_panel=LOAD)]
Period = Annotated[
    float,
    typer.Option("--period", parser=parse_seconds, metavar="TIME", help="How long `returning` runs.", rich_help_panel=LOAD),
]
Hints = Annotated[
    bool, typer.Option("--hints/--no-hints", help="Users of `returning` tell when they type.", rich_help_panel=LOAD)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, where there is no report.html.", rich_help_panel=OUTPUT)]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Keep the server up until Ctrl-C.", rich_help_panel=OUTPUT)]


FLAGS: Mapping[str, object] = {
    "users": Users,
    "turns": Turns,
    "seed": Seed,
    "arrivals": Arrive,
    "max_tokens": MaxTokens,
    "think_time": ThinkTime,
    "texts": Texts,
    "weights": WeightsForm,
    "conversations": Conversations,
    "rest": RestIn,
    "form": RestForm,
    "scale": Scale,
    "speed": Speed,
    "requests": Requests,
    "session_every": SessionEvery,
    "sessions": Sessions,
    "think": Think,
    "spread": Spread,
    "ram_for": RamFor,
    "context": Context,
    "period": Period,
    "hints": Hints,
    "model": Model,
    "peer_model": PeerModel,
    "cells": Cells,
    "threads": Threads,
    "against": Against,
    "llama_server": LlamaServer,
    "api_key": ApiKey,
    "repeat": Repeat,
    "slo": Slo,
    "slo_max_users": SloMax,
    "equal_memory": Memory,
    "out": Out,
    "request_timeout": RequestTimeout,
    "seconds": Seconds,
    "as_json": AsJson,
}
"""field of BenchOptions -> its flag"""

_DEFAULTS: Mapping[str, object] = {entry.name: entry.default for entry in fields(BenchOptions)} | {"against": None, "slo": ""}


def _flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of FLAGS in place of its `**values`."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [inspect.Parameter(name, kind, default=_DEFAULTS[name], annotation=flag) for name, flag in FLAGS.items()]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *flags)}
    return command


@_flags
def bench(
    benchmark: Annotated[
        Benchmark,
        typer.Argument(metavar="WORKLOAD", help=", ".join(benchmark.value for benchmark in Benchmark), show_default=False),
    ],
    serve_flags: ServeFlags = None,
    **values: object,
) -> None:
    """Measure pasture on real text, alone or against others on the same machine.

    `team`: one long system prompt, everybody their own chat. `docs`: many readers of a few long documents. `private`: nothing
    to share. `agents`: one context, forked at every step. `crowded`: four times more conversations than the pool has room for.

    `trace FILE`: recorded traffic, smaller and slower. `returning`, `turn-ahead`, `foresight`: what is done ahead, on and off.

    `overhead`: what pasture costs beside the model. `quality`: what each stored form does to the answers. `shift`: how long a
    full live cache takes to be written smaller, and who fits then. `restart`: the first answer after one. `import`: a
    conversation that goes on at another server. `soak`: whether anything grows. `idle`: thousands of resting conversations.
    `tiers`: every workload with tiers and without. `timing`: whether a hit of others can be felt. `remote`: a prompt that
    another server has computed, through a store that both share. `neighbours`: a tenant that sends 50 times its share. `forks`:
    one conversation in 32 branches.

        pasture bench team --users 16 --turns 3 --against isolated,llama-server
        pasture bench docs --against http://other-server:8080 --out results
    """
    behind = list(serve_flags or ())
    given = values | {
        "workload": WorkloadName(benchmark.value) if benchmark.value in list(WorkloadName) else WorkloadName.TEAM,
        "against": parse_against(cast("list[str] | None", values["against"]) or ()),
        "slo": parse_slo(str(values["slo"])),
        "trace": Path(behind.pop(0)) if benchmark is Benchmark.TRACE and behind else None,
        "serve_flags": tuple(behind),
    }
    options = BenchOptions(**given)  # type: ignore[arg-type]  # FLAGS has each field's type
    raise typer.Exit(_runner(_MODULES.get(benchmark, "pasture.bench.run"))(options))


def demo(
    users: Users = None,
    turns: Turns = None,
    seed: Seed = 1,
    max_tokens: MaxTokens = 32,
    model: Model = None,
    threads: Threads = None,
    out: Out = None,
    wait: Wait = True,
) -> None:
    """Watch sixteen people share one small model, against a context each; then talk to it yourself.

    Needs nothing but itself: a model of 94 MB came with the `demo` extra. Takes a few minutes on two cores.
    """
    options = BenchOptions(
        users=users, turns=turns, seed=seed, max_tokens=max_tokens, model=model, threads=threads, out=out, wait=wait
    )
    raise typer.Exit(_runner("pasture.bench.demo")(options))


def _runner(module: str) -> Callable[[BenchOptions], int]:
    """`main` of a module. Raises ConfigError where the `bench` extra is not installed."""
    try:
        main: Callable[[BenchOptions], int] = import_module(module).main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f"this needs {error.name.split('.')[0]}: pip install 'pasture[bench]'") from error
    return main
