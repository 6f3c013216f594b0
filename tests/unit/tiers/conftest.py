from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import tier_support


@pytest.fixture(autouse=True)
def _stores_are_closed() -> Iterator[None]:
    yield
    while tier_support.OPENED:
        tier_support.OPENED.pop().close()
