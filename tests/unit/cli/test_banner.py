"""What `pasture serve` says about where conversations rest."""

from __future__ import annotations

import dataclasses

from pasture.cli.serve import banner, resting
from pasture.config import validate_settings
from tests.unit.stub_service import StubService

STORE = StubService().statistics().store


def test_every_tier_has_its_size_and_its_place() -> None:
    settings = validate_settings({"kv_cache": "/var/cache/herd", "kv_key_file": "secret", "idle_live": "5s"})
    assert resting(STORE, settings) == (
        "after 5 s in 9.766 KiB of RAM, then 9.766 KiB of disk (/var/cache/herd, encrypted); smaller forms when RAM is short"
    )


def test_without_a_directory_there_is_ram_alone() -> None:
    ram = dataclasses.replace(STORE, tiers=STORE.tiers[:1])
    assert resting(ram, validate_settings({"kv_compress": "q8_0"})) == "after 5 s in 9.766 KiB of RAM; all as q8_0"


def test_with_no_budget_nothing_rests() -> None:
    off = dataclasses.replace(STORE, tiers=(dataclasses.replace(STORE.tiers[0], budget_bytes=0),))
    assert resting(off, validate_settings({"kv_ram": 0})).startswith("nowhere")


def test_the_banner_has_a_line_for_it() -> None:
    text = banner("http://127.0.0.1:8080", StubService(), validate_settings({"kv_compress": "off"}))
    assert "of RAM, then 9.766 KiB of disk (None); as computed" in text
