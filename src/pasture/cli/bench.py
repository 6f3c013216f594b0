"""`pasture bench WORKLOAD` and `pasture demo`: thin wrappers around `pasture.bench`, which does the measuring."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from pasture.bench.options import Arrivals, BenchOptions, WorkloadName, parse_against, parse_slo
from pasture.core.errors import ConfigError

LOAD, SYSTEMS, OUTPUT = "The load", "The systems", "The answer"
_EXTRA = {"plotly"}
"""packages of the `bench` extra"""


class Benchmark(StrEnum):
    """What `pasture bench` can run: the workloads, and what pasture itself costs."""

    TEAM = "team"
    DOCS = "docs"
    PRIVATE = "private"
    AGENTS = "agents"
    OVERHEAD = "overhead"


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
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Keep the server up until Ctrl-C.", rich_help_panel=OUTPUT)]


def bench(
    benchmark: Annotated[
        Benchmark, typer.Argument(metavar="WORKLOAD", help="team, docs, private, agents or overhead.", show_default=False)
    ],
    serve_flags: ServeFlags = None,
    users: Users = None,
    turns: Turns = None,
    seed: Seed = 1,
    arrivals: Arrive = Arrivals.SIMULTANEOUS,
    max_tokens: MaxTokens = 32,
    think_time: ThinkTime = 0.0,
    model: Model = None,
    kv_cells: Cells = 32768,
    threads: Threads = None,
    against: Against = None,
    llama_server: LlamaServer = None,
    api_key: ApiKey = None,
    repeat: Repeat = 1,
    slo: Slo = "",
    slo_max_users: SloMax = 64,
    memory: Memory = False,
    out: Out = None,
    request_timeout: RequestTimeout = 600.0,
    seconds: Seconds = 5.0,
) -> None:
    """Measure pasture on real text, alone or against others on the same machine.

    `team`: one long system prompt, everybody their own chat. `docs`: many readers of a few long documents. `private`: nothing
    to share. `agents`: one context, forked at every step. `overhead`: what pasture costs beside the model.

        pasture bench team --users 16 --turns 3 --against isolated,llama-server
        pasture bench docs --against http://other-server:8080 --out results
    """
    options = BenchOptions(
        workload=WorkloadName.TEAM if benchmark is Benchmark.OVERHEAD else WorkloadName(benchmark.value),
        users=users,
        turns=turns,
        seed=seed,
        against=parse_against(against or ()),
        repeat=repeat,
        arrivals=arrivals,
        max_tokens=max_tokens,
        cells=kv_cells,
        model=model,
        threads=threads,
        think_time=think_time,
        slo=parse_slo(slo),
        slo_max_users=slo_max_users,
        equal_memory=memory,
        out=out,
        serve_flags=tuple(serve_flags or ()),
        llama_server=llama_server,
        api_key=api_key,
        request_timeout=request_timeout,
        seconds=seconds,
    )
    raise typer.Exit(_runner("overhead" if benchmark is Benchmark.OVERHEAD else "run")(options))


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
    raise typer.Exit(_runner("demo")(options))


def _runner(module: str) -> Callable[[BenchOptions], int]:
    """`main` of a module of `pasture.bench`. Raises ConfigError where the `bench` extra is not installed."""
    try:
        main: Callable[[BenchOptions], int] = import_module(f"pasture.bench.{module}").main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        raise ConfigError(f"this needs {error.name.split('.')[0]}: pip install 'pasture[bench]'") from error
    return main
