"""Sessions that come and go leave nothing behind: `pasture bench soak`, short.

`PASTURE_TEST_SESSIONS=10000` is the whole of it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pasture.bench.options import BenchOptions
from pasture.bench.soak import soak

N_SESSIONS = int(os.environ.get("PASTURE_TEST_SESSIONS", "150"))


@pytest.mark.timeout(240 + N_SESSIONS // 5)
async def test_sessions_that_are_left_leave_nothing(tmp_path: Path) -> None:
    soaked = await soak(BenchOptions(conversations=N_SESSIONS), tmp_path, Console(quiet=True))
    assert soaked.cut_short < N_SESSIONS
    assert soaked.most.cells > 0
    assert soaked.most.ram_bytes > 0
    assert soaked.most.sessions > 0
    settled = soaked if N_SESSIONS >= 2000 else replace(soaked, growth=0.0)  # before, budgets are still filling up
    assert settled.clean, soaked
