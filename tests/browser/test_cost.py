"""What an open dashboard costs at 1,000 sessions: how much it is sent is bounded, and the rest can be measured.

`tools/page_cost.py` judges the times; a test does not.
"""

from __future__ import annotations

import pytest

from tests.browser.test_pages import CHROMIUM
from tools.page_cost import SESSIONS, measure

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it, or set PASTURE_CHROMIUM"),
    pytest.mark.slow,
]


def test_a_page_with_a_thousand_sessions_moves_and_is_sent_little() -> None:
    cost = measure(SESSIONS, seconds=3.0, pairs=1)
    assert cost.live_sequences > 240, "the live cache is full, but for what is just leaving"
    assert cost.frames > 8, "the page moved"
    assert cost.snapshot_bytes < 64 * 1024, "twice a second, however many sessions there are"
