"""What happens before a model is loaded: settings, memory, and the self-check's decisions."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from pasture.core.errors import ConfigError, DoesNotFit, ModelError
from pasture.core.values import Layout
from pasture.engine import bindings, heads, selfcheck, trial
from pasture.engine import settings as engine_settings
from pasture.engine.memory import MIB, MemoryPlan, available_bytes, check_fits, plan_memory
from pasture.engine.model import load_model
from pasture.engine.probe import probe_model
from pasture.engine.selfcheck import Trial, examine, find_safe_settings
from pasture.engine.settings import EngineSettings, default_threads
from tests.gguf_factory import write_llama


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSettings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return EngineSettings(model_path=str(write_llama(tmp_path / "m.gguf")), n_cells=512, n_seqs=4)


def children(monkeypatch: pytest.MonkeyPatch, *outcomes: str) -> list[EngineSettings]:
    """Replace the child process by prepared deaths ('' lives); returns what was tried."""
    tried: list[EngineSettings] = []
    left = iter(outcomes)

    def run(candidate: EngineSettings) -> Trial:
        tried.append(candidate)
        death = next(left)
        return Trial(death, lasting="SIGSEGV" in death)

    monkeypatch.setattr(selfcheck, "_run_child", run)
    return tried


def test_settings_are_checked() -> None:
    for wrong in ({"n_cells": 0}, {"n_seqs": 0}, {"n_threads": 0}, {"type_k": "q9"}, {"type_v": "q8_0", "flash_attn": False}):
        with pytest.raises(ConfigError):
            EngineSettings(model_path="m", **wrong)


def test_a_mac_is_asked_for_its_cores_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def run(command: list[str], **_: object) -> CompletedProcess[bytes]:
        asked.append(command)
        return CompletedProcess(command, 0, b"6\n")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(engine_settings, "run", run)
    engine_settings._performance_cores.cache_clear()
    assert [default_threads() for _ in range(3)] == [6, 6, 6]
    assert len(asked) == 1, "every conversion of KV asks how many threads it may have"
    engine_settings._performance_cores.cache_clear()


def test_healthy_settings_stay(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "")
    assert find_safe_settings(settings) == replace(settings, use_extra_bufts=True)


def test_the_trial_runs_in_streams_as_well(settings: EngineSettings) -> None:
    assert selfcheck._run_child(replace(settings, layout=Layout.STREAMS, use_extra_bufts=False)).death == ""


def test_a_crash_turns_off_what_crashed_and_says_so(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = children(monkeypatch, "a trial run was killed by SIGSEGV", "")
    with caplog.at_level(logging.WARNING):
        safe = find_safe_settings(settings)
    assert [candidate.use_extra_bufts for candidate in tried] == [True, False]
    assert safe.use_extra_bufts is False
    assert safe.n_gpu_layers == settings.n_gpu_layers
    assert "SIGSEGV" in caplog.text
    assert "use_extra_bufts" in caplog.text


def test_the_gpu_goes_last(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "x", "x", "")
    assert find_safe_settings(settings).n_gpu_layers == 0


def test_what_is_slow_in_the_living_child_is_said_and_kept(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(selfcheck, "_run_child", lambda _: Trial(slow="heads of 64 numbers; rebuild"))
    for _ in range(2):
        caplog.clear()
        assert examine(settings).reasons == ("heads of 64 numbers; rebuild",)
        assert "heads of 64" in caplog.text
        monkeypatch.setattr(selfcheck, "_run_child", lambda _: pytest.fail("the verdict is known"))


def test_another_build_of_the_library_is_another_question(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "")
    find_safe_settings(settings)
    monkeypatch.setattr(bindings, "BUILD", "rebuilt")
    tried = children(monkeypatch, "")
    find_safe_settings(settings)
    assert len(tried) == 1


def test_attention_is_timed_over_heads_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {64: 3e-3, 128: 1e-3}
    assert all((heads.attention_seconds(size) or 0) > 0 for size in times)
    monkeypatch.setattr(heads, "attention_seconds", times.__getitem__)
    assert "heads of 80 numbers number by number (64 take 3.0 times" in heads.slow_heads(80)
    assert heads.REBUILD in heads.slow_heads(64)
    assert heads.slow_heads(128) == "", "whole vectors are quick in every build"
    times[64] = 0.6e-3
    assert heads.slow_heads(64) == ""


def test_nothing_works(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "x", "x", "a trial run was killed by SIGILL")
    with pytest.raises(ModelError, match="SIGILL"):
        find_safe_settings(settings)


def test_the_verdict_is_kept(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "SIGSEGV", "")
    first = find_safe_settings(settings)
    assert first.use_extra_bufts is False
    children(monkeypatch)
    assert find_safe_settings(settings) == first


@pytest.mark.parametrize("deaths", [("SIGABRT", ""), ("SIGSEGV", "SIGABRT", ""), ("SIGSEGV", "SIGSEGV", "")])
def test_what_may_pass_is_not_kept(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, deaths: tuple[str, ...]) -> None:
    children(monkeypatch, *deaths)
    assert find_safe_settings(settings) != replace(settings, use_extra_bufts=True)
    children(monkeypatch, "")
    assert find_safe_settings(settings) == replace(settings, use_extra_bufts=True), (
        "a GPU that was busy, or a driver that failed"
    )


def test_a_verdict_that_an_earlier_version_kept_does_not_turn_the_gpu_off(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children(monkeypatch, "")
    find_safe_settings(settings)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(json.dumps({"use_extra_bufts": False, "n_gpu_layers": 0, "reasons": []}))
    children(monkeypatch, "")
    assert find_safe_settings(settings).n_gpu_layers == settings.n_gpu_layers


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"use_extra_bufts": 3}', "null"])
def test_a_damaged_verdict_is_ignored(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    children(monkeypatch, "")
    find_safe_settings(settings)
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(damage)
    tried = children(monkeypatch, "")
    find_safe_settings(settings)
    assert len(tried) == 1


def test_another_file_is_another_question(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, "")
    find_safe_settings(settings)
    write_llama(Path(settings.model_path), n_ff=64)
    tried = children(monkeypatch, "")
    find_safe_settings(settings)
    assert len(tried) == 1


def test_a_child_killed_by_a_signal_is_told_from_one_that_answers(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Child:
        def __init__(self, returncode: int, stdout: str) -> None:
            self.returncode, self.stdout = returncode, stdout

    for child, expected, lasting in (
        (Child(-signal.SIGSEGV, ""), "killed by SIGSEGV", True),
        (Child(-signal.SIGILL, ""), "killed by SIGILL", True),
        (Child(-signal.SIGABRT, ""), "killed by SIGABRT", False),
        (Child(-99, ""), "killed by signal 99", False),
        (Child(1, "Traceback"), "status 1", False),
        (Child(0, json.dumps({"ok": True})), "", False),
    ):
        monkeypatch.setattr("subprocess.run", lambda *_, child=child, **__: child)
        ended = selfcheck._run_child(settings)
        assert expected in ended.death
        assert (bool(ended.death), ended.lasting) == (bool(expected), lasting)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: Child(0, json.dumps({"error": "cut short"})))
    with pytest.raises(ModelError, match="cut short"):
        selfcheck._run_child(settings)


def test_a_real_signal_is_seen(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crashing))
    with pytest.raises(ModelError, match="SIGSEGV"):
        find_safe_settings(settings)


def test_a_slow_child_proves_nothing_and_is_not_remembered(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    monkeypatch.setattr(trial, "BASE_TIMEOUT_SECONDS", 0.05)
    assert find_safe_settings(settings).use_extra_bufts is False
    assert "no answer" in caplog.text
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_the_largest_pool_that_fits_is_named() -> None:
    plan = MemoryPlan(cell_bytes=1024, fixed_bytes=10 * MIB, available_bytes=12 * MIB)
    check_fits(plan, 2048)
    with pytest.raises(DoesNotFit, match="largest that fits is 2048 cells"):
        check_fits(plan, 4096)
    with pytest.raises(DoesNotFit, match="not even"):
        check_fits(replace(plan, available_bytes=MIB), 256)


def test_weights_count_where_they_are_read(settings: EngineSettings) -> None:
    info = probe_model(settings.model_path)
    mapped = plan_memory(info, settings, n_embd=64, available=MIB)
    read = plan_memory(info, replace(settings, use_mmap=False), n_embd=64, available=MIB)
    assert read.fixed_bytes - mapped.fixed_bytes == info.n_bytes
    assert available_bytes() > 0


def test_who_waits_for_a_model_hears_how_far_it_is(settings: EngineSettings) -> None:
    heard: list[float] = []
    load_model(replace(settings, use_extra_bufts=False), heard.append).close()
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
