"""`pasture top` on a screen: tables that can be sorted and scrolled, and numbers that stay when the server goes."""

from __future__ import annotations

from typing import Any

import pytest
from textual.widgets import DataTable, Static, TabbedContent

from pasture.cli.top_screen import Screen, SheetTable
from pasture.cli.top_sheets import sheets
from pasture.core.errors import PastureError
from tests.unit.cli.test_top import URL, snapshot

SIZE = (120, 40)


class Server:
    """Answers with `now`, or with an error where that is None."""

    def __init__(self) -> None:
        self.now: Any = snapshot() | {
            "sequences": [[number, "idle", 100 * number, 50, 1.5, None] for number in range(60)],
            "prefixes": [[7, None, 1, 0, 64, 3, 1, 2.0, 9, None]],
        }
        self.asked = 0

    async def look(self) -> Any:
        self.asked += 1
        if self.now is None:
            raise PastureError("it cannot be reached")
        return self.now


def screen(server: Server) -> Screen:
    return Screen(server.now, server.look, URL, interval_seconds=0.3)


def column(table: DataTable[Any], index: int) -> list[str]:
    return [str(table.get_row_at(row)[index]) for row in range(table.row_count)]


async def test_the_largest_sequences_come_first_until_asked_otherwise() -> None:
    app = screen(Server())
    async with app.run_test(size=SIZE) as pilot:
        table = app._table()
        assert column(table, 2)[:2] == ["5,900", "5,800"]
        await pilot.press("r")
        assert column(table, 2)[:2] == ["0", "100"]
        await pilot.press("s")
        assert [str(each.label) for each in table.ordered_columns][2:4] == ["tokens", "shared ▼"]


async def test_a_click_on_a_heading_sorts_by_it() -> None:
    app = screen(Server())
    async with app.run_test(size=SIZE) as pilot:
        await pilot.click(SheetTable, offset=(2, 0))
        await pilot.pause()
        assert column(app._table(), 0)[:2] == ["59", "58"]


async def test_who_scrolled_stays_where_they_were() -> None:
    server = Server()
    app = screen(server)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press(*["down"] * 30)
        asked, top = server.asked, app._table().scroll_offset.y
        assert top > 0
        while server.asked < asked + 2:
            await pilot.pause(0.02)
        assert (app._table().cursor_row, app._table().scroll_offset.y) == (30, top)


async def test_columns_are_as_wide_as_what_they_show_and_measured_once_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    app = screen(server)
    measured = 0
    whole = SheetTable.get_column

    def get_column(table: SheetTable, key: Any) -> Any:
        nonlocal measured
        measured += 1
        return whole(table, key)

    async with app.run_test(size=SIZE) as pilot:
        for factor in (10**6, 1):
            asked, measured = server.asked, 0
            monkeypatch.setattr(SheetTable, "get_column", get_column)
            server.now = server.now | {"sequences": [[n, "idle", factor * (n + 1), n, 1.5 * factor, None] for n in range(60)]}
            while server.asked < asked + 2:
                await pilot.pause(0.02)
            table = app._table()
            assert measured <= len(table.ordered_columns), "textual walks over the whole column each time"
            monkeypatch.undo()
            for index, shown in enumerate(table.ordered_columns):
                assert shown.content_width == max(len(str(shown.label)), *map(len, column(table, index)))


async def test_every_table_of_a_cluster_shows() -> None:
    server = Server()
    server.now |= {"cluster": {"replicas": [["one", "here", 60.0, False, 2, 64, 10, 128, 4096]]}}
    server.now |= {"prefixes": [[7, None, 1, 0, 64, 3, 1, 2.0, 9, "one"]]}
    app = screen(server)
    async with app.run_test(size=SIZE) as pilot:
        seen = {}
        for sheet in sheets(server.now):
            await pilot.pause()
            seen[app.query_one(TabbedContent).active] = app._table().row_count
            assert len(app._table().ordered_columns) == len(sheet.columns)
            await pilot.press("right_square_bracket")
        assert seen["replicas"] == 1
        assert seen["prefixes"] == 1
        assert seen["tiers"] == len(server.now["tiers"])
        assert app.query_one(TabbedContent).active == "sequences"


async def test_old_numbers_stay_when_the_server_goes_and_say_so() -> None:
    server = Server()
    app = screen(server)
    async with app.run_test(size=SIZE) as pilot:
        server.now = None
        asked = server.asked
        while server.asked < asked + 2:
            await pilot.pause(0.02)
        shown = str(app.query_one("#title", Static).render())
        assert "it cannot be reached; these numbers are older" in shown
        assert app._table().row_count == 60


async def test_paused_it_asks_nothing() -> None:
    server = Server()
    app = screen(server)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("p")
        await pilot.pause(0.05)
        asked = server.asked
        await pilot.pause(0.1)
        assert server.asked == asked
        assert "paused" in str(app.query_one("#title", Static).render())
