"""`pasture bench shift`: puts an engine together for `pasture.bench.shifting`, and prints what it finds.

In the calling thread.
"""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

from rich.table import Table

from pasture.bench.answering import Answer, deliver
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.run import progress_bar
from pasture.bench.shifting import N_COMPUTED, N_TOKENS, REPLY_TOKENS, USER_CELLS, Found, measure
from pasture.cli.output import err, report
from pasture.cli.quality import model_settings
from pasture.core.errors import PastureError
from pasture.core.values import Form
from pasture.server import measuring_engine

MIN_ROUNDS = 3
LIMIT_SECONDS = 1.0
MOST_GROWTH = 3
"""times as many users as before have a sequence, so that cells alone say how many fit"""


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, whatever came out."""
    rounds = max(MIN_ROUNDS, options.repeat)
    n_seqs = MOST_GROWTH * max(1, options.cells // USER_CELLS)
    try:
        with (
            progress_bar(err()) as progress,
            measuring_engine(model_settings(options), options.cells, n_seqs) as engine,
        ):
            task = progress.add_task("a full live cache is shifted", total=N_COMPUTED + rounds)
            found = measure(engine, options.seed, rounds, lambda: progress.advance(task))
    except PastureError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    deliver(Answer({"found": asdict(found)}, [table(found)]), options)
    return 0


def table(found: Found) -> Table:
    made = Table(title=f"a live cache of {found.cells_raw:,} cells, {found.used_cells:,} of them in use, written smaller")
    for heading in ("", "measured", "wanted"):
        made.add_column(heading, justify="left" if not heading else "right")
    down = [each.down_seconds for each in found.rounds]
    made.add_row(f"shift down, median of {len(down)}", seconds(median(down)), f"below {LIMIT_SECONDS:.0f} s")
    made.add_row("the slowest of them", seconds(max(down)), "")
    made.add_row("shift back, median", seconds(median(each.back_seconds for each in found.rounds)), "")
    made.add_row(f"cells, {Form.RAW.value} and {Form.Q8_0.value}", f"{found.cells_raw:,} and {found.cells_down:,}", "")
    if found.annex_cells:
        made.add_row("and in the annex, whose bytes are then the pool's", f"{found.annex_cells:,} and 0", "")
    made.add_row(f"users of {N_TOKENS:,} tokens that fit", f"{found.users_raw:,} and {found.users_down:,}", "twice as many")
    for name, agreeing in (
        ("after the shift down", min(each.agreeing_down for each in found.rounds)),
        ("after the shift back", min(each.agreeing_back for each in found.rounds)),
    ):
        made.add_row(f"of {REPLY_TOKENS} tokens, as without a shift, {name}", str(agreeing), "")
    return made
