"""`pasture cluster`: one server out of several machines, on Ray: up, status, scale, drain, down."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import time
from asyncio import CancelledError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.table import Table

from pasture.cli.flags import with_settings
from pasture.cli.output import err, out, set_up_logging
from pasture.config import Configuration, Settings
from pasture.core.errors import ConfigError

cluster = typer.Typer(no_args_is_help=True, help="One server out of several machines.")

ADDRESS = typer.Option(
    "--address",
    metavar="ADDRESS",
    help="The Ray cluster: HOST:PORT, auto, ray://HOST:PORT; local is one of this machine's own.",
)
Address = Annotated[str | None, ADDRESS]
END_SECONDS = 60.0


@cluster.command("up")
@with_settings()
def up(
    configuration: Configuration,
    replicas: Annotated[int, typer.Option("--replicas", min=1, metavar="N", help="Engines, each a whole model.")] = 2,
    ingresses: Annotated[int, typer.Option("--ingresses", min=1, metavar="N", help="Processes that answer clients.")] = 2,
    address: Annotated[str, ADDRESS] = "local",
    cpus: Annotated[float, typer.Option("--cpus", min=0, help="Of a node's CPUs, what Ray counts for a replica.")] = 0.0,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="Of a node's GPUs, what Ray counts for a replica.")] = 0.0,
) -> None:
    """Start replicas and ingresses, and wait until they serve.

    A local cluster stays in the foreground until Ctrl-C or `pasture cluster down`; on a Ray cluster that is there the command
    returns. Every setting of `pasture serve` is passed on to each replica.
    """
    settings = _prepared(configuration.settings, local=address == "local")
    set_up_logging(settings.log_level, settings.log_format)
    with _ray():
        from pasture.fleet.connection import connected, local_ray

        err().print(f"Starting {replicas} replicas and {ingresses} ingresses ...", style="dim")
        with local_ray() if address == "local" else connected(address):
            from pasture.fleet import application
            from pasture.fleet.directory import Blueprint

            blueprint = Blueprint(settings, secrets.token_bytes(32), ingresses, cpus, gpus)
            application.up(blueprint, replicas)
            scheme = "https" if settings.ssl_cert_file else "http"
            host = settings.host.replace("0.0.0.0", "127.0.0.1")
            err().print(f"[bold]pasture[/] serves at [bold cyan]{scheme}://{host}:{settings.port}/v1[/]", highlight=False)
            if address == "local":
                _wait_for_the_end()
                err().print("Ending ...", style="dim")
                application.down()


@cluster.command("status")
def status(address: Address = None, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Who is there, where, and how they are."""
    with _connected(address):
        import asyncio

        from pasture.fleet import application

        parts, members = application.status(), asyncio.run(application.members())
        if as_json:
            rows = [
                {"replica": m.replica, "node": m.node, "host": m.host, "port": m.port, "pid": m.pid, "draining": m.draining}
                for m in members
            ]
            states = [{"name": part.name, "status": part.status, "message": part.message} for part in parts]
            typer.echo(json.dumps({"parts": states, "replicas": rows}))
            return
        table = Table("part", "state", "node", "address", "process", box=None)
        by_name = {f"{application.APPLICATION}{member.replica}": member for member in members}
        for part in parts:
            member = by_name.get(part.name)
            where = (member.node, f"{member.host}:{member.port}", str(member.pid)) if member else ("", "", "")
            state = "DRAINING" if member and member.draining else part.status
            table.add_row(part.name.removeprefix(application.APPLICATION), state, *where)
        out().print(table)


@cluster.command("scale")
def scale(
    replicas: Annotated[int, typer.Argument(min=1, metavar="N", help="Replicas that there should be.")], address: Address = None
) -> None:
    """Have N replicas: new ones start empty, those that go hand their conversations over first."""
    with _connected(address):
        from pasture.fleet import application

        _print_carried(application.scale(replicas))
        out().print(f"{len(application.replicas())} replicas")


@cluster.command("drain")
def drain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A replica, or a node by its name or address.")],
    address: Address = None,
) -> None:
    """Take a replica, or all of a node, out of the cluster without losing anything."""
    with _connected(address):
        import asyncio

        from pasture.fleet import application

        names = application.chosen(asyncio.run(application.members()), name)
        _print_carried(application.drain(names))


@cluster.command("cordon")
def cordon(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A replica, or a node by its name or address.")],
    address: Address = None,
) -> None:
    """Give a replica, or all of a node, nothing new. It stays, with what it holds, until it is drained or starts again."""
    with _connected(address):
        import asyncio

        from pasture.fleet import application

        names = application.chosen(asyncio.run(application.members()), name)
        application.cordon(names)
        out().print(f"{', '.join(names)}: nothing new")


@cluster.command("down")
def down(address: Address = None) -> None:
    """End the cluster."""
    with _ray():
        from pasture.fleet.connection import connected, held

        local = held() if address in (None, "local") else None
        if local is None:
            with connected(address):
                from pasture.fleet import application

                application.down()
            return
        os.kill(local.pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while held() is not None:
            if time.monotonic() > deadline:
                raise ConfigError(f"process {local.pid} does not end")
            time.sleep(0.1)


@cluster.command("bench")
def bench(
    model: Annotated[str | None, typer.Option("-m", "--model", metavar="FILE", help="A GGUF file, for the pool.")] = None,
    kv_remote: Annotated[str | None, typer.Option("--kv-remote", metavar="URL", help="The pool to measure with it.")] = None,
    threads: Annotated[int, typer.Option("-t", "--threads", min=1, metavar="N", help="Of each replica, with a model.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Of each throughput run.")] = 15.0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Prompts that are restored.")] = 3,
) -> None:
    """Measure on this machine: two replicas against one and the way through an ingress, or what the shared pool saves.

    Without a model, engines that only sleep are driven. With `-m` and `--kv-remote`, a prompt of 2,000 tokens is computed on
    one replica and restored on another.
    """
    with _ray():
        from pasture.bench import cluster as measuring
        from pasture.bench.client import run_loop

        if (model is None) != (kv_remote is None):
            raise ConfigError("-m and --kv-remote go together: the one is measured with the other")
        try:
            if model is not None and kv_remote is not None:
                flags = ("-t", str(threads))
                found = run_loop(measuring.measure_restoring(model, kv_remote, flags, repeats, err()))
                measuring.report_restoring(found, out())
            else:
                measuring.report(*run_loop(measuring.measure(seconds, err())), out())
        except (KeyboardInterrupt, CancelledError):
            raise typer.Exit(130) from None


@cluster.command("demo")
def demo(
    stay: Annotated[bool, typer.Option("--stay/--no-stay", help="Go on serving afterwards, until Ctrl-C.")] = True,
) -> None:
    """Three replicas of the small model; the one that writes is killed in the middle of its reply."""
    with _ray():
        from pasture.bench.cluster_demo import main

        raise typer.Exit(main(stay=stay))


def _prepared(settings: Settings, *, local: bool) -> Settings:
    """With one port for all ingresses, and one database."""
    changes: dict[str, object] = {}
    for host, port in (("host", "port"), ("admin_host", "admin_port")):
        if getattr(settings, port) == 0:
            with socket.create_server((getattr(settings, host), 0)) as free:
                changes[port] = free.getsockname()[1]
    if settings.state is None:
        if not local:
            raise ConfigError("--state: ingresses on several machines need one database: postgresql://...")
        from pasture.fleet.paths import state_directory

        changes["state"] = str(state_directory() / "cluster.sqlite")
    return settings.model_copy(update=changes)


def _wait_for_the_end() -> None:
    """Until SIGINT or SIGTERM."""
    signals = {signal.SIGINT, signal.SIGTERM}
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        signal.pause()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_carried(told: dict[str, dict[str, object]]) -> None:
    for name, what in told.items():
        if "error" in what:
            out().print(f"{name}: {what['error']}; what it held is computed again when asked for")
        else:
            out().print(
                f"{name}: {what['carried']} of {what['conversations']} conversations handed over, "
                f"{what['tokens']} tokens, {int(str(what['bytes'])) >> 20} MiB"
            )


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    with _ray():
        from pasture.fleet.connection import connected

        with connected(address):
            yield


@contextmanager
def _ray() -> Iterator[None]:
    """Raises ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: pip install 'pasture[cluster]'")
    yield
