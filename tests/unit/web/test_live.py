"""The live picture over time: rates, what happened, percentiles of the last minute; one look for all who watch."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

from rich.console import Console

from pasture.cli import top_picture
from pasture.cluster.sums import total
from pasture.core.statistics import NamespaceStatistics, ServiceStatistics
from pasture.core.values import Form, Namespace, SeqId
from pasture.web import Live, Recent
from pasture.web.snapshot import MAX_NAMESPACES, MAX_SEQUENCES
from tests.unit.stub_service import StubService


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Growing:
    """Statistics whose counters are moved by hand; counts how often somebody looks."""

    def __init__(self) -> None:
        self.value = StubService().statistics()
        self.looks = 0

    def __call__(self) -> ServiceStatistics:
        self.looks += 1
        return self.value

    def scheduler(self, **changes: int) -> None:
        self.value = dataclasses.replace(self.value, scheduler=dataclasses.replace(self.value.scheduler, **changes))  # type: ignore[arg-type]  # counters are ints

    def evict(self, **cells: int) -> None:
        self.value = dataclasses.replace(self.value, pool=dataclasses.replace(self.value.pool, evicted_cells=cells))

    def forms(self, sizes: dict[Form, int]) -> None:
        ram, *slower = self.value.store.tiers
        tiers = (dataclasses.replace(ram, bytes_by_form=sizes), *slower)
        self.value = dataclasses.replace(self.value, store=dataclasses.replace(self.value.store, tiers=tiers))

    def tier(self, **changes: int) -> None:
        ram, *slower = self.value.store.tiers
        tiers = (dataclasses.replace(ram, **changes), *slower)  # type: ignore[arg-type]  # every counter is an int
        self.value = dataclasses.replace(self.value, store=dataclasses.replace(self.value.store, tiers=tiers))


def live_of(growing: Growing, clock: Hands) -> tuple[Live, Recent, Recent]:
    first, between = Recent(clock), Recent(clock)
    return Live(growing, lambda: "stub", clock, first, between), first, between


def picture(live: Live) -> Any:
    return json.loads(live.snapshot())


def test_rates_are_of_the_time_between_two_looks() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    assert picture(live)["rates"]["generated"] == 0
    growing.scheduler(generated_tokens_total=44 + 30, computed_tokens_total=30 + 9)
    clock.now += 2
    rates = picture(live)["rates"]
    assert (rates["generated"], rates["computed"], rates["reused"]) == (15, 4.5, 0)


def test_a_hundred_who_watch_cost_one_look_a_tick() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    for _ in range(100):
        live.snapshot()
    clock.now += 0.5
    for _ in range(100):
        live.snapshot()
    assert growing.looks == 2


def test_counters_that_grew_are_happenings_the_latest_first() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    evicted = dict(growing.value.pool.evicted_cells)
    live.snapshot()
    growing.evict(**(evicted | {"cells": evicted.get("cells", 0) + 64}))
    clock.now += 1
    live.snapshot()
    growing.tier(read_bytes=2000 + 512)
    growing.scheduler(swaps_total=1)
    clock.now += 1
    happened = [(ago, kind, amount, unit) for _, ago, kind, amount, unit, _ in picture(live)["happenings"]]
    assert happened[-1] == (1.0, "evicted", 64, "tokens")
    assert set(happened[:-1]) == {(0.0, "restored", 512, "bytes"), (0.0, "swapped", 1, "times")}


def test_compression_is_a_happening() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    live.snapshot()
    growing.forms({Form.RAW: 1000, Form.Q8_0: 1500})
    clock.now += 1
    ((_, _, *squeezed),) = picture(live)["happenings"]
    assert squeezed == ["squeezed", 500, "bytes", "more in ram as q8_0, to make room"]


def test_what_happened_while_nobody_looked_is_no_news() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    live.snapshot()
    growing.scheduler(generated_tokens_total=1_000_000, swaps_total=7)
    clock.now += 3600
    late = picture(live)
    assert (late["rates"]["generated"], late["happenings"]) == (0, [])


def test_percentiles_are_of_the_last_minute() -> None:
    growing, clock = Growing(), Hands()
    live, first, _ = live_of(growing, clock)
    first.add(99.0)
    clock.now += 61
    for hundredths in range(100):
        first.add(hundredths / 100)
    found = picture(live)["latency"]
    assert found["first_token"] == {"count": 100, "p50": 0.5, "p95": 0.95, "p99": 0.99}
    assert found["inter_token"] is None


def test_of_many_times_the_last_count() -> None:
    growing, clock = Growing(), Hands()
    live, _, between = live_of(growing, clock)
    for number in range(10_000):
        between.add(float(number))
    found = picture(live)["latency"]["inter_token"]
    assert found["count"] == 4096
    assert found["p50"] == 10_000 - 2048


def test_the_pool_is_drawn_anew_when_it_has_changed() -> None:
    growing, clock = Growing(), Hands()
    live, _, _ = live_of(growing, clock)
    before = picture(live)["sequences"]
    clock.now += 1
    assert picture(live)["sequences"] == before
    (one, *others) = growing.value.pool.sequences
    changed = (dataclasses.replace(one, n_tokens=one.n_tokens + 1), *others)
    growing.value = dataclasses.replace(growing.value, pool=dataclasses.replace(growing.value.pool, sequences=changed))
    clock.now += 1
    after = picture(live)["sequences"]
    assert [row[2] for row in after] == [before[0][2] + 1, *(row[2] for row in before[1:])]


def test_an_ingress_without_a_replica_is_drawn_as_empty() -> None:
    lost = total(StubService.model, {}, {}, draining=False)
    shown = picture(Live(lambda: lost, lambda: "stub", Hands(), Recent(Hands()), Recent(Hands())))
    assert (shown["pool"]["cells"], shown["pool"]["cell_bytes"], shown["tiers"]) == (0, 0, [])
    text = Console(file=io.StringIO(), width=100)
    text.print(top_picture.picture(shown, [0.0], "http://herd:8080"))
    assert isinstance(text.file, io.StringIO)
    assert "– of 0 cells" in text.file.getvalue()


def test_of_a_thousand_sequences_and_tenants_the_page_is_sent_the_largest() -> None:
    growing, clock = Growing(), Hands()
    (one, *_) = growing.value.pool.sequences
    sequences = tuple(dataclasses.replace(one, sequence=SeqId(i), n_tokens=i) for i in range(1000))
    tenants = tuple(NamespaceStatistics(Namespace(f"tenant {i}"), 8, 4, 1, i, 0) for i in range(1000))
    pool = dataclasses.replace(growing.value.pool, sequences=sequences, namespaces=tenants)
    growing.value = dataclasses.replace(growing.value, pool=pool)
    live, _, _ = live_of(growing, clock)
    shown = picture(live)
    assert (shown["pool"]["sequences"], shown["pool"]["namespaces"]) == (1000, 1000)
    assert {row[0] for row in shown["sequences"]} == set(range(1000 - MAX_SEQUENCES, 1000))
    assert {row[4] for row in shown["namespaces"]} == set(range(1000 - MAX_NAMESPACES, 1000))
    assert len(live.snapshot()) < 16 * 1024
