"""`pasture bench idle`: puts engines, stores and services together for `pasture.bench.idle`, and prints what it finds.

Two services in one process, equal but for what rests in the store of one. In the calling thread, but for the services' own.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pasture.bench.answering import Answer, deliver
from pasture.bench.idle import (
    ACTIVE_USERS,
    N_COMPUTED,
    N_TOKENS,
    SHARED_TOKENS,
    FormCost,
    Resting,
    Resumed,
    compute,
    decode_gaps,
    expected_blocks,
    form_costs,
    rest,
    resume,
)
from pasture.bench.options import BenchOptions, Rest
from pasture.bench.report import seconds
from pasture.bench.run import progress_bar
from pasture.cli.output import err, report
from pasture.cli.quality import model_settings
from pasture.config import Settings, format_bytes
from pasture.core.errors import ConfigError, PastureError
from pasture.core.ports import Engine, Service
from pasture.core.storage import Store, StoreStatistics
from pasture.core.values import Form
from pasture.engine.memory import available_bytes
from pasture.server import service_over, start_engine
from pasture.tiers.compression import deflate

DECODE_TOKENS = 96
MIN_ROUNDS = 9
"""shared machines change their speed by a fifth within a minute: who goes first alternates too"""
REST_SECONDS = 1800.0
RAM_MARGIN = 1.2
"""of the RAM budget, over what is expected to rest there"""
RAM_BESIDE_DISK = 256 << 20
PICTURE_SECONDS = 1.5
"""until a slow tier's figures are up to date"""
FREE_SHARE = 0.8
"""of the machine's free memory that may rest"""
_SHARES = {Form.RAW: 1.0, Form.LOSSLESS: 1.0, Form.Q8_0: 34 / 64, Form.Q4_0: 18 / 64}


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that was measured."""

    costs: tuple[FormCost, ...]
    gaps_without: tuple[float, ...]
    """seconds between tokens, a round each"""
    gaps_with: tuple[float, ...]
    resumed: tuple[Resumed, ...]
    store: StoreStatistics
    resident_bytes: int
    """that the process grew by while they were put to rest"""
    kept_blocks: int
    """in the last tier, before anybody was active"""

    @property
    def slowdown(self) -> float:
        """Of decoding with the resting conversations, against without; 1 is none."""
        return median(self.gaps_with) / median(self.gaps_without)


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, whatever came out."""
    try:
        with tempfile.TemporaryDirectory(prefix="pasture-idle-") as folder:
            settings = _settings(options, Path(folder))
            found = _measure(options, settings, err())
    except PastureError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    deliver(Answer({"found": _plain(found)}, [form_table(found, options), speed_table(found, options)]), options)
    return 0


def _settings(options: BenchOptions, folder: Path) -> Settings:
    compress = "off" if options.form is Form.RAW else options.form.value
    base = model_settings(options, kv_cells=options.cells, kv_compress=compress, kv_layout="unified")
    if options.rest is Rest.DISK:
        return base.model_copy(update={"kv_ram": RAM_BESIDE_DISK, "kv_cache": str(folder)})
    return base


def _with_room(settings: Settings, options: BenchOptions, resting: Resting) -> Settings:
    """RAM for all of them. Raises ConfigError where this machine has not that much."""
    if options.rest is Rest.DISK:
        return settings
    own = resting.slabs[0].n_bytes * (N_TOKENS - SHARED_TOKENS + 64) / N_TOKENS
    needed = int(own * _SHARES[options.form] * options.conversations * RAM_MARGIN) + (512 << 20)
    if needed > available_bytes() * FREE_SHARE:
        raise ConfigError(
            f"{options.conversations} conversations need {format_bytes(needed)} of RAM as {options.form.value}: "
            "use --rest disk, a smaller --form, or fewer --conversations"
        )
    return settings.model_copy(update={"kv_ram": needed})


def _measure(options: BenchOptions, settings: Settings, console: Console) -> Found:
    with ExitStack() as stack, progress_bar(console) as progress:
        engine = start_engine(settings)
        try:
            resting, costs = _computed(engine, options, progress)
            settings = _with_room(settings, options, resting)
            filled = stack.enter_context(closing(_filled(engine, settings, options, resting, progress)))
        except PastureError:
            engine.close()
            raise
        alone = settings.model_copy(update={"kv_cache": None})
        empty = stack.enter_context(closing(service_over(start_engine(alone), alone)))
        service, grown, kept = filled.service, filled.resident_bytes, filled.kept_blocks
        rounds = max(MIN_ROUNDS, options.repeat)
        task = progress.add_task(f"{ACTIVE_USERS} users decode", total=2 * rounds)
        without: list[float] = []
        with_them: list[float] = []
        for number in range(rounds):
            pair = ((empty, without), (service, with_them))
            for each, gaps in pair if number % 2 == 0 else reversed(pair):
                gaps.append(asyncio.run(decode_gaps(each, max(DECODE_TOKENS, options.max_tokens), options.seed + number)))
                progress.advance(task)
        resumed = [asyncio.run(resume(service, tokens, number)) for number, tokens in enumerate(resting.tokens)]
        store = service.statistics().store
        return Found(tuple(costs), tuple(without), tuple(with_them), tuple(resumed), store, grown, kept)


def _computed(engine: Engine, options: BenchOptions, progress: Progress) -> tuple[Resting, Sequence[FormCost]]:
    task = progress.add_task(f"{N_COMPUTED} conversations computed", total=2)
    resting = compute(engine, options.seed)
    progress.advance(task)
    costs = form_costs(engine, resting, deflate)
    progress.advance(task)
    return resting, costs


@dataclass(frozen=True, slots=True)
class _Filled:
    service: Service
    resident_bytes: int
    kept_blocks: int

    def close(self) -> None:
        self.service.close()


def _filled(engine: Engine, settings: Settings, options: BenchOptions, resting: Resting, progress: Progress) -> _Filled:
    task = progress.add_task("conversations put to rest", total=options.conversations)
    process = psutil.Process()
    before = process.memory_info().rss
    update: Callable[[int], None] = lambda done: progress.update(task, completed=done)  # noqa: E731

    def prepare(_: Engine, store: Store) -> None:
        rest(store, resting, options.conversations, options.form is not Form.RAW, update, REST_SECONDS)

    service = service_over(engine, settings, prepare)
    time.sleep(PICTURE_SECONDS)
    kept = service.statistics().store.tiers[-1].blocks
    return _Filled(service, process.memory_info().rss - before, kept)


def form_table(found: Found, options: BenchOptions) -> Table:
    """Bytes of an idle conversation in every form, from a computed one."""
    n = options.conversations
    table = Table(title=f"an idle conversation of {N_TOKENS:,} tokens, {SHARED_TOKENS} of them shared by {n:,}")
    for heading in ("form", "own blocks", "with its share", "full f16 state", "times smaller", "restore"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for cost in found.costs:
        table.add_row(
            cost.form.value,
            format_bytes(cost.own_bytes),
            format_bytes(round(cost.per_conversation(n))),
            format_bytes(cost.full_bytes),
            f"{cost.times_smaller(n):.2f}",
            "-" if cost.form is Form.LOSSLESS else f"{cost.restore_bytes_per_second / 1e9:.2f} GB/s",
        )
    return table


def speed_table(found: Found, options: BenchOptions) -> Table:
    """What they cost the others, and what coming back costs."""
    table = Table(title=f"{options.conversations:,} idle conversations in {options.rest.value} as {options.form.value}")
    for heading in ("", "measured", "wanted"):
        table.add_column(heading, justify="left" if not heading else "right")
    without, with_them = median(found.gaps_without), median(found.gaps_with)
    table.add_row(f"between tokens, {ACTIVE_USERS} users, none idle", seconds(without), "")
    table.add_row(f"between tokens, {ACTIVE_USERS} users, with them", seconds(with_them), "")
    table.add_row("slower by", f"{found.slowdown - 1:+.1%}", "at most 5 %")
    table.add_row("blocks of theirs at rest", f"{found.kept_blocks:,}", f"{expected_blocks(options.conversations):,}")
    for tier in found.store.tiers:
        table.add_row(f"{tier.name}: {tier.blocks:,} blocks", format_bytes(tier.bytes), "")
        table.add_row("  a conversation", format_bytes(round(tier.bytes / options.conversations)), "")
        table.add_row("  evicted, damaged, errors", f"{tier.evicted_blocks}, {tier.damaged_blocks}, {tier.errors}", "")
    table.add_row("the process grew by", format_bytes(found.resident_bytes), "")
    table.add_row("next turn, first token", seconds(median(each.ttft_seconds for each in found.resumed)), "")
    worst = max(each.recomputed_tokens for each in found.resumed)
    table.add_row("next turn, old tokens computed again, at most", str(worst), "at most 1")
    table.add_row("restore, as the cost gate measured", f"{found.store.restore_bytes_per_second / 1e9:.2f} GB/s", "2 GB/s")
    return table


def _plain(found: Found) -> dict[str, object]:
    plain = asdict(found)
    for tier in plain["store"]["tiers"]:
        tier["bytes_by_form"] = {form.value: size for form, size in tier["bytes_by_form"].items()}
    return plain | {"slowdown": found.slowdown}
