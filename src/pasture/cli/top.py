"""`pasture top`: the dashboard's numbers in a terminal. Asks a running server for `/v1/live/now`, knows nothing else of it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from pasture.cli.output import out, print_json
from pasture.cli.top_picture import Json, picture
from pasture.core.errors import PastureError

if TYPE_CHECKING:
    from pasture.bench.client import Endpoint

DEFAULT_URL = "http://127.0.0.1:8080"
_ASK_SECONDS = 10.0


class NoNumbers(PastureError):
    """The server could not be asked, or is none of pasture's."""


def top(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="The running server.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PASTURE_API_KEY", help="A key of it; the admin key where it has one.")
    ] = None,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON and leave.")] = False,
) -> None:
    """Watch a running server: who is there, what sharing saves, where conversations are. Its keys are in its last line.

    pasture top
    pasture top http://127.0.0.1:8080 --once
    """
    from pasture.bench.client import Endpoint

    endpoint = Endpoint.parse(url, api_key)
    snapshot = asyncio.run(look(endpoint))
    if once or as_json:
        time.sleep(interval)  # rates are between two looks
        snapshot = asyncio.run(look(endpoint))
        if as_json:
            print_json(snapshot)
        else:
            out().print(picture(snapshot, [snapshot["rates"]["generated"]], endpoint.url))
        return
    from pasture.cli.top_screen import Screen

    Screen(snapshot, lambda: look(endpoint), endpoint.url, interval).run()


async def look(endpoint: Endpoint) -> Json:
    """One snapshot. Raises NoNumbers with what is in the way."""
    from pasture.bench.client import call

    try:
        status, answer = await call(endpoint, "/v1/live/now", timeout_seconds=_ASK_SECONDS)
    except TimeoutError as error:
        raise NoNumbers(f"{endpoint.url} did not answer within {_ASK_SECONDS:g} s") from error
    except OSError as error:
        raise NoNumbers(f"{endpoint.url} cannot be reached: {error}") from error
    if status == 401:
        raise NoNumbers(f"{endpoint.url} shows its numbers to those who have its key: --api-key")
    try:
        snapshot = json.loads(answer)
    except ValueError:
        snapshot = None
    if status != 200 or not isinstance(snapshot, dict) or "headline" not in snapshot:
        raise NoNumbers(f"{endpoint.url} has no live numbers (HTTP {status}): is it a pasture server?")
    return snapshot
