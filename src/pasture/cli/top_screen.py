"""`pasture top` as it stays on the screen: the overview, and tables to scroll through and to sort.

A server that stops answering leaves its last numbers on the screen, with a remark. One event loop, textual's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.widgets import DataTable, Footer, Static, TabbedContent, TabPane

from pasture.cli.top_picture import STRIP_CHARACTERS, Json, overview, title
from pasture.cli.top_sheets import Sheet, sheets
from pasture.core.errors import PastureError


class SheetTable(DataTable[Text]):
    """One sheet, in the order that its reader chose."""

    def __init__(self, sheet: Sheet) -> None:
        super().__init__(cursor_type="row", zebra_stripes=True)
        self._sheet = sheet
        self._column, self._descending = sheet.sorted_by, True

    def on_mount(self) -> None:
        self._name_columns()

    def fill(self, snapshot: Json) -> None:
        """New numbers in the rows that are there, so that who scrolled stays where they were."""
        rows = sorted(self._sheet.rows(snapshot), key=lambda row: row[self._column].order, reverse=self._descending)
        for index in range(len(rows), self.row_count):
            self.remove_row(str(index))
        changed: dict[int, list[tuple[int, Text]]] = {}
        for index, row in enumerate(rows):
            cells = [Text(cell.text, justify="left" if isinstance(cell.order, str) else "right") for cell in row]
            if index >= self.row_count:
                self.add_row(*cells, key=str(index))
                continue
            for column, (old, new) in enumerate(zip(self.get_row(str(index)), cells, strict=True)):
                if old.plain != new.plain:
                    changed.setdefault(column, []).append((index, new))
        for column, updates in changed.items():
            widest = max(updates, key=lambda update: update[1].cell_len)  # for others the whole column would be measured again
            for update in updates:
                self.update_cell(str(update[0]), str(column), update[1], update_width=update is widest)

    def sort_by(self, column: int) -> None:
        """By this column, largest first; the other way round when it is that already."""
        self._descending = not self._descending if column == self._column else True
        self._column = column
        self._name_columns()

    def sort_by_next(self) -> None:
        self.sort_by((self._column + 1) % len(self._sheet.columns))

    def reverse(self) -> None:
        self.sort_by(self._column)

    def _name_columns(self) -> None:
        self.clear(columns=True)
        for index, name in enumerate(self._sheet.columns):
            arrow = (" ▼" if self._descending else " ▲") if index == self._column else ""
            self.add_column(name + arrow, key=str(index))


class Screen(App[None]):
    """All of it. `look` raises PastureError where the server has no numbers at present."""

    TITLE = "pasture top"
    CSS = """
    #title, #overview { padding: 0 1; height: auto; }
    #overview { margin: 1 0; }
    TabbedContent, ContentSwitcher, TabPane, SheetTable { height: 1fr; }
    TabPane { padding: 0; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "leave"),
        Binding("p,space", "pause", "pause"),
        Binding("s", "sort", "sort by the next column"),
        Binding("r", "reverse", "the other way round"),
        Binding("left_square_bracket", "turn(-1)", "table before", key_display="["),
        Binding("right_square_bracket", "turn(1)", "table after", key_display="]"),
    ]

    def __init__(self, snapshot: Json, look: Callable[[], Awaitable[Json]], url: str, interval_seconds: float) -> None:
        super().__init__()
        self._snapshot, self._look, self._url, self._interval = snapshot, look, url, interval_seconds
        self._history: deque[float] = deque([snapshot["rates"]["generated"]], maxlen=STRIP_CHARACTERS)
        self._remark = ""
        self._paused = False

    def compose(self) -> ComposeResult:
        yield Static(id="title")
        yield Static(id="overview")
        with TabbedContent():
            for sheet in sheets(self._snapshot):
                with TabPane(sheet.name, id=sheet.name.lower()):
                    yield SheetTable(sheet)
        yield Footer()

    def on_mount(self) -> None:
        self._draw()
        self.set_interval(self._interval, self._look_again)

    async def _look_again(self) -> None:
        if self._paused:
            return
        try:
            self._snapshot = await self._look()
        except PastureError as error:
            self._remark = f"{error}; these numbers are older"
        else:
            self._remark = ""
            self._history.append(self._snapshot["rates"]["generated"])
        with suppress(NoMatches):  # who leaves while the server is asked has no screen any more
            self._draw()

    def _draw(self) -> None:
        remark = "paused" if self._paused else self._remark
        self.query_one("#title", Static).update(title(self._snapshot, self._url, remark))
        self.query_one("#overview", Static).update(overview(self._snapshot, self._history))
        self._table().fill(self._snapshot)

    def _table(self) -> SheetTable:
        """The one that shows."""
        pane = self.query_one(TabbedContent).active_pane
        return (pane or self).query(SheetTable).first()

    def on_tabbed_content_tab_activated(self) -> None:
        self._draw()
        self._table().focus()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        self._table().sort_by(event.column_index)
        self._draw()

    def action_pause(self) -> None:
        self._paused = not self._paused
        self._draw()

    def action_sort(self) -> None:
        self._table().sort_by_next()
        self._draw()

    def action_reverse(self) -> None:
        self._table().reverse()
        self._draw()

    def action_turn(self, by: int) -> None:
        tabs = self.query_one(TabbedContent)
        names = [sheet.name.lower() for sheet in sheets(self._snapshot)]
        tabs.active = names[(names.index(tabs.active) + by) % len(names)]
