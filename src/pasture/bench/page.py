"""A benchmark's report as one HTML page with plots, complete in itself: it asks no other host for anything.

Owns the choice of plots. Needs plotly (extra `bench`), whose script is put into the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go  # type: ignore[import-untyped]

from pasture.bench.report import ROWS, ratio_text
from pasture.bench.results import Report, Run, Summary

_COLOURS = ("#2e7d32", "#c62828", "#1565c0", "#6a1b9a", "#ef6c00", "#455a64")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } .ratio { font-weight: 600; color: #2e7d32; }
"""


def write_page(report: Report, path: Path) -> None:
    """The page at `path`, about 5 MB because plotly's script is inside."""
    chosen = [(summary, _first_run(report, summary)) for summary in report.best]
    plots = [
        _bars(report.best),
        _distribution("Time to first token", chosen, lambda run: [t.first - t.sent for t in run.traces if t.first is not None]),
        _distribution("Gaps inside streams", chosen, lambda run: [gap for trace in run.traces for gap in trace.gaps]),
        _prompt_tokens(report.best),
        *(_timeline(summary, run) for summary, run in chosen),
    ]
    if report.users_within_slo:
        plots.append(_single_bars(f"Users inside {report.settings['slo']}", report.users_within_slo, "users"))
    if report.memory:
        sizes = {peer: (run.peak_bytes or 0) / 2**20 for peer, run in report.memory.items()}
        plots.append(_single_bars("Peak memory with just the cells that the workload needs", sizes, "MiB"))
    body = [
        plot.to_html(full_html=False, include_plotlyjs=index == 0, include_mathjax=False) for index, plot in enumerate(plots)
    ]
    title = escape(report.title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    sections = [
        f"<h1>{title}</h1>",
        _table(report),
        *body,
        _facts("Settings", report.settings),
        _facts("Machine", report.machine),
    ]
    path.write_text(head + "\n".join(sections) + "</html>\n", encoding="utf-8")


def _first_run(report: Report, summary: Summary) -> Run:
    return next(run for run in report.runs if run.label == summary.label)


def _table(report: Report) -> str:
    ours, *peers = report.best
    head = "".join(f"<th>{escape(s.label)}</th>{'' if s is ours else '<th>ratio</th>'}" for s in report.best)
    rows = []
    for row in ROWS:
        value = row.value(ours.median)
        cells = [row.name, "-" if value is None else row.text(float(value))]
        for peer in peers:
            theirs = row.value(peer.median)
            cells += [
                "-" if theirs is None else row.text(float(theirs)),
                f'<span class="ratio">{ratio_text(value, theirs)}</span>',
            ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _facts(title: str, facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<h2>{title}</h2><table>{rows}</table>"


def _bars(best: Sequence[Summary]) -> go.Figure:
    names = ("wall", "ttft_mean", "ttft_p95", "latency_mean", "itl_p95", "itl_max")
    figure = go.Figure(
        [
            go.Bar(name=summary.label, x=names, y=[summary.median.level(name) for name in names], marker_color=_colour(index))
            for index, summary in enumerate(best)
        ]
    )
    return figure.update_layout(
        title="Seconds, less is better", yaxis_type="log", yaxis_title="seconds", template="simple_white"
    )


def _distribution(title: str, chosen: Sequence[tuple[Summary, Run]], values: Callable[[Run], list[float]]) -> go.Figure:
    figure = go.Figure()
    for index, (summary, run) in enumerate(chosen):
        ordered = sorted(values(run))
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        figure.add_scatter(x=ordered, y=shares, name=summary.label, line_shape="hv", line_color=_colour(index))
    return figure.update_layout(
        title=f"{title}: share of all at or below", xaxis_type="log", xaxis_title="seconds", template="simple_white"
    )


def _prompt_tokens(best: Sequence[Summary]) -> go.Figure:
    labels = [summary.label for summary in best]
    figure = go.Figure(
        [
            go.Bar(name="computed", x=labels, y=[summary.median.computed_tokens for summary in best], marker_color=_COLOURS[1]),
            go.Bar(name="distinct", x=labels, y=[summary.median.distinct_tokens for summary in best], marker_color=_COLOURS[0]),
        ]
    )
    return figure.update_layout(
        title="Prompt tokens computed, and those that a perfect cache would compute", template="simple_white"
    )


def _timeline(summary: Summary, run: Run) -> go.Figure:
    """A line a user: waiting for the first token in grey, streaming in colour."""
    figure = go.Figure()
    waiting = [(trace.sent, trace.first or trace.ended, trace.user) for trace in run.traces]
    streaming = [(trace.first, trace.ended, trace.user) for trace in run.traces if trace.first is not None]
    for name, colour, spans in (("waiting", "#bdbdbd", waiting), ("streaming", _COLOURS[0], streaming)):
        figure.add_bar(
            name=name,
            orientation="h",
            y=[user for _, _, user in spans],
            base=[start for start, _, _ in spans],
            x=[end - start for start, end, _ in spans],
            marker_color=colour,
        )
    return figure.update_layout(
        title=f"{summary.label}: who waits, who streams", barmode="overlay", xaxis_title="seconds", template="simple_white"
    )


def _single_bars(title: str, values: dict[str, int] | dict[str, float], unit: str) -> go.Figure:
    figure = go.Figure([go.Bar(x=list(values), y=list(values.values()), marker_color=list(_COLOURS[: len(values)]))])
    return figure.update_layout(title=title, yaxis_title=unit, template="simple_white")


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]
