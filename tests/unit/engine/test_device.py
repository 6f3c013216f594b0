"""Whose memory bounds the pool: the machine's, or a GPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pasture.core.values import ModelInfo
from pasture.engine import device
from pasture.engine.memory import MIB, MemoryPlan
from pasture.engine.settings import EngineSettings

GIB = 1 << 30
INFO = ModelInfo("m", "m.gguf", "llama", "llama 1B", 1, GIB, 32_000, 16, 8192, cell_bytes=100_000, shareable=True)
HOST = MemoryPlan(cell_bytes=100_000, fixed_bytes=0, available_bytes=256 * MIB)
"""a small container's"""
SETTINGS = EngineSettings(model_path="m.gguf")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small machine with a large GPU."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(device, "free_bytes", lambda: [80 * GIB])
    monkeypatch.setattr(device, "plan_memory", lambda *_, **__: HOST)


def plan(settings: EngineSettings = SETTINGS) -> MemoryPlan | None:
    return device.plan_pool(INFO, settings, n_embd=2048)


@pytest.mark.parametrize("n_gpu_layers", [-1, 17, 99])
def test_a_model_that_is_all_on_the_gpu_is_bounded_by_it(n_gpu_layers: int) -> None:
    found = plan(replace(SETTINGS, n_gpu_layers=n_gpu_layers))
    assert found is not None
    assert found.available_bytes == 80 * GIB
    assert GIB < found.fixed_bytes < 3 * GIB, "the weights are there as well"
    assert found.largest_cells > 100 * HOST.largest_cells


def test_without_a_gpu_the_machine_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(replace(SETTINGS, n_gpu_layers=0)) == HOST
    monkeypatch.setattr(device, "free_bytes", list)
    assert plan() == HOST, "an integrated one has the machine's memory"
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert plan() == HOST


def test_on_a_mac_the_gpu_has_the_machine_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert plan() == HOST


def test_a_part_of_the_layers_leaves_a_part_of_the_cache_and_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert plan(replace(SETTINGS, n_gpu_layers=16)) == HOST
    assert "16 of 17 layers" in caplog.text
    assert "-c or --kv-memory" in caplog.text


def test_a_gpu_that_does_not_answer_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda: None)
    assert plan() is None


def test_several_gpus_are_as_large_as_their_shares_allow() -> None:
    assert device.usable([10, 30], ()) == 40
    assert device.usable([10, 30], (1, 1)) == 20
    assert device.usable([10, 30], (0, 1)) == 30
    assert device.usable([10, 30], (1, 3, 5)) == 40
    assert device.usable([10, 30], (0, 0)) == 40


@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo a line of the library; echo '[5, 7]'", [5, 7]), ("kill -ABRT $$", None), ("exit 1", None), ("echo nonsense", None)],
)
def test_who_asks_is_a_process_that_may_die(
    script: str, answer: list[int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.undo()
    python = tmp_path_factory.mktemp("bin") / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    assert device.free_bytes() == answer


def test_the_library_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(device.free_bytes(), list), "empty where there is no GPU"
