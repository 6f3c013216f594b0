"""Settings become each room's own, the pool is sized as the documentation says, and what cannot work is refused in words."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from pasture import server
from pasture.config import Settings, validate_settings
from pasture.core.errors import ConfigError, ModelError
from pasture.core.values import ModelInfo
from pasture.scheduler.settings import LayoutChoice
from tests.gguf_factory import write_llama
from tests.unit.stub_service import StubService

MODEL = ModelInfo("small", "small.gguf", "llama", "llama 1M", 1, 1 << 20, 512, 2, 8192, cell_bytes=1000, shareable=True)


def cells(largest: int | None = 1 << 30, **values: object) -> int:
    return server.pool_cells(validate_settings(values), MODEL, lambda: largest)


def test_the_default_pool_is_bounded_by_reason_and_by_what_fits() -> None:
    assert cells() == server.DEFAULT_CELLS
    assert cells(largest=10_000) == 7936, "four fifths of what fits, in steps of 256"
    assert cells(largest=0) == 256, "the engine is asked anyway: it says what does not fit"


def test_a_gpu_that_does_not_say_what_is_free_bounds_nothing_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert cells(largest=None) == server.DEFAULT_CELLS
    assert "-c or --kv-memory" in caplog.text


def test_nobody_is_asked_what_fits_when_the_size_was_given() -> None:
    given = validate_settings({"kv_cells": 5000})
    assert server.pool_cells(given, MODEL, lambda: pytest.fail("a GPU takes a process to ask")) == 5000


def test_cells_and_bytes_size_the_pool() -> None:
    assert cells(kv_cells=5000) == 5000
    assert cells(kv_memory="1MB") == 768
    assert cells(kv_memory=2_560_000) == 2560


def test_a_pool_smaller_than_the_smallest_is_refused() -> None:
    with pytest.raises(ConfigError, match="a token takes 1000 B, the least is 250 KiB"):
        cells(kv_memory="100KiB")


def test_bytes_cannot_size_a_cache_that_has_no_cells() -> None:
    recurrent = ModelInfo("r", "r.gguf", "mamba", "mamba", 1, 1, 512, 2, 8192, cell_bytes=0, shareable=False)
    with pytest.raises(ConfigError, match="use kv_cells"):
        server.pool_cells(validate_settings({"kv_memory": "1GiB"}), recurrent, lambda: 1 << 30)
    assert server.pool_cells(Settings(), recurrent, lambda: 1 << 30) == server.DEFAULT_CELLS


def test_no_model_is_a_matter_of_settings_and_a_missing_file_is_not() -> None:
    with pytest.raises(ConfigError, match="no model: give -m FILE"):
        server.engine_settings(Settings())
    with pytest.raises(ModelError, match="no model file at nowhere"):
        server.engine_settings(validate_settings({"model": "nowhere.gguf"}))


def test_streams_are_long_enough_for_a_conversation_and_two_at_least() -> None:
    assert server.stream_sequences(128, 32768) == 16
    assert server.stream_sequences(4, 32768) == 4
    assert server.stream_sequences(128, 512) == 2


@pytest.mark.parametrize(
    ("asked", "cells"),
    [
        ({"kv_cells": 2048}, 0),
        ({"kv_cells": 4352}, 1024),
        ({"kv_cells": 32768}, 4096),
        ({"kv_cells": 32768, "kv_layout": "streams"}, 0),
        ({"kv_cells": 32768, "kv_annex": 0}, 0),
        ({"kv_cells": 512, "kv_annex": 300}, 512),
        ({"kv_cells": 512, "kv_annex": 10_000}, 512),
    ],
)
def test_the_annex_is_a_quarter_of_the_pool_within_bounds_or_what_was_asked_for(
    tmp_path: Path, asked: dict[str, object], cells: int
) -> None:
    settings = validate_settings({"model": str(write_llama(tmp_path / "m.gguf")), **asked})
    assert server.engine_settings(settings).annex_cells == cells


def test_the_schedulers_part() -> None:
    part = server.scheduler_settings(
        validate_settings(
            {"share_prefix": False, "kv_layout": "streams", "itl_target": "50ms", "max_queue": 3, "timeout": "9s"}
        )
    )
    assert (part.share_prefix, part.layout, part.max_waiting) == (False, LayoutChoice.STREAMS, 3)
    assert part.itl_target_seconds == pytest.approx(0.05)
    assert part.default_deadline_seconds == 9


@pytest.mark.parametrize(("settings", "kept"), [({}, 9000.0), ({"kv_expire": "1h"}, 3600.0), ({"kv_expire": "24h"}, 9000.0)])
def test_kv_of_a_tenant_is_kept_for_its_idle_time_and_no_longer_than_any(settings: dict[str, object], kept: float) -> None:
    service, given = StubService(), validate_settings(settings)
    with closing(server.open_state(given)) as state:
        hasty = state.tenants.create("hasty", idle_seconds=9000.0)
        server.keep_sweeping(state, service, given)
        until = time.monotonic() + 10.0
        while service.kept_for is None and time.monotonic() < until:
            time.sleep(0.001)
        assert service.kept_for == {hasty.namespace(): kept}


def test_https_part_with_keys_from_both_places(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# the team\nfirst\n\n second \n")
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    part = server.api_settings(
        validate_settings(
            {
                "api_key": "zero",
                "api_key_file": str(keys),
                "chat_template_file": str(template),
                "model": "/m/small.gguf",
                "top_k": 1,
            }
        )
    )
    assert part.api_keys == ("zero", "first", "second")
    assert part.chat_template == "{{ messages }}"
    assert part.model_alias == "small"
    assert part.sampling.top_k == 1
    assert server.api_settings(validate_settings({"alias": "us", "model": "x.gguf"})).model_alias == "us"


def test_a_key_file_without_keys_does_not_open_the_server(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        server.api_settings(validate_settings({"api_key_file": str(empty)}))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        server.api_settings(validate_settings({"api_key_file": str(tmp_path / "absent")}))
