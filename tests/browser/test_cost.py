"""What an open dashboard costs at 1,000 sessions, in processor time: the page less than a frame, the server less than 1 %.

The figures are of `tools/page_cost.py`, which prints them.
"""

from __future__ import annotations

import pytest

from tests.browser.test_pages import CHROMIUM
from tools.page_cost import FRAME_MS, SERVER_SHARE, SESSIONS, measure

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it, or set PASTURE_CHROMIUM"),
    pytest.mark.slow,
]


def test_a_thousand_sessions_cost_less_than_a_frame_and_a_hundredth_of_a_core() -> None:
    cost = measure(SESSIONS, seconds=3.0)
    assert cost.live_sequences == 256, "the live cache is full"
    assert cost.frames > 8, "the page moved"
    assert cost.worst_frame_ms < FRAME_MS
    assert cost.server_share < SERVER_SHARE
