"""`pasture cache ls|stats|verify|prune|clear`: look after a disk cache, whether or not a server is using it.

Thin commands over `pasture.tiers.disk_cache`. A cache holds blocks, each a stretch of some conversation; a block that nothing
follows ends a conversation, and those are what people want listed. Nothing here needs a model, and only `verify` can make use
of the secret that a cache is encrypted under.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pasture.cli.output import err, out, print_json
from pasture.config import format_bytes, format_seconds, load_configuration, parse_bytes, parse_seconds
from pasture.core.errors import ConfigError, PastureError

if TYPE_CHECKING:
    from pasture.tiers.disk_cache import DiskCache
    from pasture.tiers.disk_rows import Row

SHOWN_CONVERSATIONS = 20
SECONDS_A_DAY = 86_400
NAME_DIGITS = 12
"""of a block's name, enough to tell them apart"""

Directory = Annotated[
    Path | None,
    typer.Argument(metavar="[DIR]", help="The server's --kv-cache; where settings name one, that one.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

cache = typer.Typer(no_args_is_help=True, help="Look after a disk cache; a server may be using it meanwhile.")


@cache.command("ls")
def ls(
    directory: Directory = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Conversations to show.")] = SHOWN_CONVERSATIONS,
    as_json: AsJson = False,
) -> None:
    """List the conversations in a cache, last used first: size, age, hits."""
    with _opened(directory) as opened:
        rows = opened.index.rows(limit, leaves=True)
        sizes = [opened.index.path_bytes(row.name) for row in rows]
        others = _other_versions(opened)
    now = time.time()
    if as_json:
        conversations = [_as_json(row, size, now) for row, size in zip(rows, sizes, strict=True)]
        print_json({"conversations": conversations, "other_versions": others})
        return
    caption = "\n".join((_LS_CAPTION, *(f"{name}: {what}." for name, what in _told(others))))
    table = Table(title="Conversations", title_justify="left", caption=caption, caption_justify="left")
    for heading in ("ends in", "tokens", "size", "form", "written", "used", "hits"):
        table.add_column(heading, justify="left" if heading in ("ends in", "form") else "right", no_wrap=True)
    for row, size in zip(rows, sizes, strict=True):
        form = f"{row.form.value}{', encrypted' if row.sealed else ''}"
        ages = (_ago(now - row.written), _ago(now - row.used))
        table.add_row(row.name.hex()[:NAME_DIGITS], f"{row.p1:,}", format_bytes(size), form, *ages, f"{row.hits:,}")
    out().print(table)


_LS_CAPTION = "Sizes include what conversations have in common, which is stored once."


@cache.command("stats")
def stats(directory: Directory = None, as_json: AsJson = False) -> None:
    """Count blocks and bytes in a cache, by form."""
    with _opened(directory) as opened:
        rows = opened.index.rows()
        conversations = len(opened.index.rows(leaves=True))
        others = _other_versions(opened)
        free_bytes = shutil.disk_usage(opened.files.root).free
    now = time.time()
    n_blocks, n_bytes = Counter(row.form.value for row in rows), Counter[str]()
    for row in rows:
        n_bytes[row.form.value] += row.n_bytes
    facts = {
        "conversations": conversations,
        "blocks": len(rows),
        "bytes": n_bytes.total(),
        "blocks_by_form": dict(n_blocks),
        "bytes_by_form": dict(n_bytes),
        "encrypted_blocks": sum(row.sealed for row in rows),
        "hits": sum(row.hits for row in rows),
        "oldest_use_seconds": round(now - min((row.used for row in rows), default=now), 1),
        "other_versions": others,
        "free_bytes": free_bytes,
    }
    if as_json:
        print_json(facts)
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("conversations", f"{conversations:,}")
    table.add_row("blocks", f"{len(rows):,}, {format_bytes(n_bytes.total())}")
    for form, n_of_form in n_blocks.items():
        table.add_row(f"  {form}", f"{n_of_form:,}, {format_bytes(n_bytes[form])}")
    table.add_row("encrypted", f"{facts['encrypted_blocks']:,}")
    table.add_row("hits", f"{facts['hits']:,}")
    table.add_row("longest unused", _ago(now - min((row.used for row in rows), default=now)))
    for name, what in _told(others):
        table.add_row(name, what)
    table.add_row("free on the disk", format_bytes(free_bytes))
    out().print(table, highlight=False)


@cache.command("verify")
def verify(
    directory: Directory = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make the index anew from the files.")] = False,
    key_file: Annotated[
        Path | None, typer.Option("--kv-key-file", metavar="FILE", help="Also open what is encrypted under this key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every file of a cache, take away those that are damaged, and name those that cannot be read."""
    from pasture.tiers.sealed import SealedWire, read_secret

    secret_file = key_file or _configured_path(load_configuration().settings.kv_key_file)
    wire = SealedWire(read_secret(secret_file)) if secret_file is not None else None
    with _opened(directory) as opened:
        n_files = n_bytes = n_closed = 0
        damaged, unreadable = {}, {}
        for verdict in opened.verify(wire):
            n_files, n_bytes = n_files + 1, n_bytes + verdict.n_bytes
            if verdict.damage is not None:
                damaged[verdict.name.hex()] = verdict.damage
            elif verdict.unreadable is not None:
                unreadable[verdict.name.hex()] = verdict.unreadable
            elif not verdict.opened:
                n_closed += 1
        if rebuild:
            opened.index.rebuild()
        opened.settle(time.time())
    if as_json:
        print_json(
            {
                "files": n_files,
                "bytes": n_bytes,
                "damaged": damaged,
                "unreadable": unreadable,
                "not_opened": n_closed,
                "rebuilt": rebuild,
            }
        )
        return
    for name, reason in damaged.items():
        err().print(f"{name[:NAME_DIGITS]}: {reason}; removed", markup=False, highlight=False)
    for name, reason in unreadable.items():
        err().print(f"{name[:NAME_DIGITS]}: cannot be read ({reason}); left where it is", markup=False, highlight=False)
    remark = f", {len(unreadable):,} unreadable" if unreadable else ""
    remark += f", {n_closed:,} encrypted ones by their checksum alone" if n_closed else ""
    out().print(f"{n_files:,} files, {format_bytes(n_bytes)}: {len(damaged):,} damaged and removed{remark}", highlight=False)


@cache.command("prune")
def prune(
    directory: Directory = None,
    to: Annotated[str | None, typer.Option("--to", metavar="SIZE", help="Keep at most so much, last used first.")] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="TIME", help="Remove what was not used for so long, as 168h.")
    ] = None,
    other_versions: Annotated[
        bool, typer.Option("--other-versions", help="Remove what other versions of pasture left.")
    ] = False,
) -> None:
    """Make a cache smaller: least recently used blocks go first, the ends of conversations before their beginnings."""
    if to is None and older_than is None and not other_versions:
        raise ConfigError("say what is to go: --to SIZE, --older-than TIME, --other-versions")
    target_bytes = _parsed("--to", parse_bytes, to)
    age_seconds = _parsed("--older-than", parse_seconds, older_than)
    with _opened(directory) as opened:
        opened.settle(time.time())
        gone = [] if age_seconds is None else opened.expire(time.time() - age_seconds, {})
        gone += [] if target_bytes is None else opened.evict(int(target_bytes))
        others = _remove_other_versions(opened) if other_versions else {}
    _tell_removed(len(gone), sum(row.n_bytes for row in gone), others)


@cache.command("clear")
def clear(directory: Directory = None, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Remove every block of a cache, and what other versions of pasture left."""
    with _opened(directory) as opened:
        if not yes:
            typer.confirm(f"Remove everything that is cached in {opened.files.root}?", abort=True)
        n_bytes = sum(fact.n_bytes for fact in opened.files.scan())
        n_blocks = opened.clear()
        others = _remove_other_versions(opened)
    _tell_removed(n_blocks, n_bytes, others)


@contextmanager
def _opened(given: Path | None) -> Iterator[DiskCache]:
    from pasture.tiers.disk_cache import DiskCache
    from pasture.tiers.disk_files import LAYOUT, private_directory
    from pasture.tiers.disk_index import IndexUnavailable
    from pasture.tiers.disk_versions import other_versions

    directory = given or _configured_path(load_configuration().settings.kv_cache)
    if directory is None:
        raise ConfigError("which cache? Name its directory, or set PASTURE_KV_CACHE, or kv_cache in pasture.toml")
    if not (directory / LAYOUT).is_dir() and not (directory.is_dir() and other_versions(directory)):
        raise ConfigError(f"there is no cache in {directory}")
    opened = DiskCache(private_directory(directory))
    try:
        opened.files.create()  # beside what another version left
        yield opened
    except (OSError, IndexUnavailable) as error:
        raise PastureError(f"the cache in {directory} cannot be used now: {error}") from None
    finally:
        opened.close()


def _configured_path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _parsed(flag: str, parse: Callable[[str], float], text: str | None) -> float | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _other_versions(opened: DiskCache) -> Mapping[str, int]:
    from pasture.tiers.disk_versions import other_versions

    return other_versions(opened.files.root.parent)


def _remove_other_versions(opened: DiskCache) -> Mapping[str, int]:
    """Their names -> bytes that they had."""
    from pasture.tiers.disk_versions import remove_other_versions

    found = _other_versions(opened)
    remove_other_versions(opened.files.root.parent)
    return found


def _told(others: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for name, n_bytes in others.items():
        yield name, f"{format_bytes(n_bytes)} of another version of pasture, which prune --other-versions removes"


def _tell_removed(n_blocks: int, n_bytes: int, others: Mapping[str, int]) -> None:
    out().print(f"{n_blocks:,} blocks removed, {format_bytes(n_bytes)}", highlight=False)
    for name, n_other_bytes in others.items():
        out().print(f"{name} of another version of pasture removed, {format_bytes(n_other_bytes)}", highlight=False)


def _ago(seconds: float) -> str:
    if seconds >= 2 * SECONDS_A_DAY:
        return f"{seconds / SECONDS_A_DAY:.1f} d ago"
    return f"{format_seconds(round(max(0.0, seconds), 1))} ago"


def _as_json(row: Row, path_bytes: int, now: float) -> dict[str, object]:
    return {
        "ends_in": row.name.hex(),
        "tokens": row.p1,
        "bytes": path_bytes,
        "form": row.form.value,
        "whole": row.whole,
        "encrypted": row.sealed,
        "written_seconds_ago": round(now - row.written, 1),
        "used_seconds_ago": round(now - row.used, 1),
        "hits": row.hits,
    }
