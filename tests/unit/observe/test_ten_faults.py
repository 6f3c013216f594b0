"""Ten faults, each planted alone, each found by `pasture doctor` as people run it, under its own name; none on a healthy run.

Faults of clients are planted in a request log, faults of a server in what a server tells over HTTP.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pasture.api import ApiSettings, create_app, pressure
from pasture.api.server import DrainingServer, ServerOptions, bind
from pasture.cli.main import main
from pasture.core.statistics import PrefixStatistics, ServiceStatistics
from pasture.core.storage import TierStatistics
from pasture.core.values import DEFAULT_NAMESPACE, Layout
from tests.unit.stub_service import CHAT_TEMPLATE, MODEL, StubService

RULES = "You are the assistant of a team that keeps sheep on a common pasture. Be brief, and never invent numbers. " * 6
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("count", "shear")]
STRIPPING = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")


def said(*texts: str, system: str = RULES) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": "system", "content": system}, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]


HEALTHY_LOG = [
    {"user": "ada", "messages": said("How many sheep?"), "tools": TOOLS, "reply": "Forty."},
    {"user": "bob", "messages": said("Who shears?"), "tools": TOOLS},
    {"user": "ada", "messages": said("How many sheep?", "Forty.", "And goats?"), "tools": TOOLS},
]


class Healthy(StubService):
    """A server with nothing wrong: the stub's few blemishes are taken out."""

    def statistics(self) -> ServiceStatistics:
        found = super().statistics()
        store = dataclasses.replace(found.store, tiers=tuple(map(self.tier, found.store.tiers)), gate_refusals={})
        return dataclasses.replace(found, store=store, model=self.model)

    def tier(self, tier: TierStatistics) -> TierStatistics:
        return dataclasses.replace(tier, errors=0, damaged_blocks=0)


class SmallPool(Healthy):
    def statistics(self) -> ServiceStatistics:
        found = super().statistics()
        pool = dataclasses.replace(found.pool, evicted_cells={"cells": 9000})
        return dataclasses.replace(found, pool=pool, scheduler=dataclasses.replace(found.scheduler, swapped=2))


class Copying(Healthy):
    def statistics(self) -> ServiceStatistics:
        found = super().statistics()
        shape = dataclasses.replace(found.pool.shape, layout=Layout.STREAMS)
        shared = PrefixStatistics(1, None, DEFAULT_NAMESPACE, 0, 45, 2, 2, 0.0, 1, array("i", range(45)))
        pool = dataclasses.replace(found.pool, shape=shape, prefixes=(shared, dataclasses.replace(shared, number=2)))
        return dataclasses.replace(found, pool=pool)


class SlowTier(Healthy):
    """A remote tier so slow that nothing is even sent there."""

    def statistics(self) -> ServiceStatistics:
        found = super().statistics()
        return dataclasses.replace(found, store=dataclasses.replace(found.store, gate_refusals={"spill": 3}))

    def tier(self, tier: TierStatistics) -> TierStatistics:
        rate = tier.bytes_per_second if tier.name == "ram" else 4e3
        return dataclasses.replace(super().tier(tier), bytes_per_second=rate)


def without_amx() -> StubService:
    reason = "self-check: a trial run was killed by SIGILL; repacked weight buffers (use_extra_bufts) turned off"
    return Healthy(model=dataclasses.replace(MODEL, slowed_by=(reason,)))


def doctor(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments, "--watch", "0", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["unseen"] == []
    return int(end.value.code or 0), told["findings"]


@contextmanager
def served(service: StubService, settings: ApiSettings | None = None) -> Iterator[str]:
    socket = bind("127.0.0.1", 0)
    server = DrainingServer(create_app(service, settings), ServerOptions())
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_nothing_is_found_in_a_healthy_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(logged(tmp_path, HEALTHY_LOG), "--kv-cells", "8192", capsys=capsys) == (0, [])


def test_nothing_is_found_on_a_healthy_server(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(Healthy()) as url:
        assert doctor(url, capsys=capsys) == (0, [])


def logged(folder: Path, entries: Sequence[Mapping[str, object]]) -> str:
    file = folder / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)))
    return str(file)


@pytest.fixture
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's memory is like now."""
    memory = pressure.Memory(0, 4 << 30, 0.0)
    monkeypatch.setattr("pasture.api.diagnosis.read_memory", lambda: memory)


def test_1_a_timestamp_at_the_head_of_the_system_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [{"messages": said("Hi", system=f"It is 2031-05-04 09:{minute}:00. {RULES}")} for minute in (10, 11)]
    found(doctor(logged(tmp_path, log), capsys=capsys), "timestamp_in_head", "09:10:00")


def test_2_tools_in_changing_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [*HEALTHY_LOG, {"user": "eve", "messages": said("Hello"), "tools": TOOLS[::-1]}]
    found(doctor(logged(tmp_path, log), capsys=capsys), "tools_in_changing_order", "lines 1, 4")


def test_3_an_edited_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited = said("How many sheep?", "Forty-one.", "And goats?", "None.", "Thanks")
    log = [*HEALTHY_LOG, {"user": "ada", "messages": edited, "tools": TOOLS}]
    found(doctor(logged(tmp_path, log), capsys=capsys), "edited_history", "“Forty.”")


def test_4_a_template_that_strips_reasoning(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(Healthy(), ApiSettings(chat_template=STRIPPING, turn_ahead=False)) as url:
        found(doctor(url, capsys=capsys), "template_strips_reasoning", "<think>")


def test_a_template_may_strip_reasoning_where_the_next_turn_is_made_ready(
    capsys: pytest.CaptureFixture[str], enough_memory: None
) -> None:
    with served(Healthy(), ApiSettings(chat_template=STRIPPING)) as url:
        assert doctor(url, capsys=capsys) == (0, [])


def test_what_does_not_open_to_the_key_is_named(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(Healthy(), ApiSettings(api_keys=("theirs",), admin_key="root")) as url, pytest.raises(SystemExit) as end:
        main(["doctor", url, "--api-key", "root", "--watch", "0"])
    told = " ".join(capsys.readouterr().out.split())
    assert end.value.code in (0, None)
    assert "Nothing wrong found" in told
    assert "Not looked at, because it does not open to this key or on this port: the chat template (/apply-template)." in told


def test_5_a_pool_too_small_with_the_size_that_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [{"messages": [{"role": "user", "content": f"{i}" * 4096}]} for i in range(8)] * 3
    (finding,) = found(
        doctor(logged(tmp_path, documents), "--kv-cells", "2048", capsys=capsys), "pool_too_small", "2,048 cells"
    )
    assert "--kv-cells 8192," in finding["advice"]
    assert doctor(logged(tmp_path, documents), "--kv-cells", "8192", capsys=capsys) == (0, []), "that size does"


def test_6_the_wrong_layout_for_the_traffic(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(Copying()) as url:
        found(doctor(url, capsys=capsys), "wrong_layout", "90 of 100 used cells")


def test_7_sharing_off_between_tenants_with_equal_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [{"tenant": name, "messages": said("Hello")} for name in ("sales", "support")]
    found(doctor(logged(tmp_path, log), capsys=capsys), "equal_prompts_apart", "sales, support")


def test_8_swap(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasture.api.diagnosis.read_memory", lambda: pressure.Memory(900 << 20, 4 << 30, 0.0))
    with served(Healthy()) as url:
        found(doctor(url, capsys=capsys), "memory_pressure", "swapped_bytes 943718400")


def test_9_repacked_weights_turned_off(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(without_amx()) as url:
        found(doctor(url, capsys=capsys), "slowed_by", "SIGILL")


def test_10_a_tier_slower_than_recomputing(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(SlowTier()) as url:
        found(doctor(url, capsys=capsys), "tier_slower_than_computing", "3 x spill")


def test_a_live_pool_that_is_too_small_is_told_a_size_too(capsys: pytest.CaptureFixture[str], enough_memory: None) -> None:
    with served(SmallPool()) as url:
        (finding,) = found(doctor(url, capsys=capsys), "pool_too_small", "9,000 tokens were evicted")
    assert f"--kv-cells {100 + 4096}" in finding["advice"]


def found(told: tuple[int, list[dict[str, Any]]], name: str, evidence: str) -> list[dict[str, Any]]:
    """The one finding there should be."""
    code, findings = told
    assert [finding["name"] for finding in findings] == [name]
    assert evidence in findings[0]["evidence"]
    assert findings[0]["advice"]
    assert code == 3
    return findings
