"""Summaries, the terminal's table, the page, and the demo's last words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from pasture.bench.demo import change, first_shared, promptly_served, users_that_fit
from pasture.bench.measure import Outside, figures
from pasture.bench.options import BenchOptions
from pasture.bench.overhead import StepCost, tokens_between
from pasture.bench.page import write_page
from pasture.bench.report import print_report
from pasture.bench.results import Report, Run, best_variants, summarise, traces
from pasture.bench.run import cells_needed, describe
from pasture.bench.workloads import build
from tests.unit.bench.test_client import CHAT
from tests.unit.bench.test_figures import exchange


def run(peer: str, label: str, wall: float, *, error: str | None = None) -> Run:
    exchanges = [exchange(0.0, wall / 2, wall), exchange(0.0, wall / 4, wall / 2, error=error)]
    return Run(peer, label, figures(exchanges, Outside(distinct_tokens=10, peak_bytes=2**20)), traces(exchanges))


def report(*runs: Run, with_extras: bool = False) -> Report:
    summaries = summarise(runs)
    best = best_variants(summaries)
    return Report(
        title="pasture bench team",
        settings={"slo": "ttft_p95 <= 4 s", "model": "<small>.gguf"},
        machine={"cores": "2"},
        summaries=summaries,
        best=best,
        users_within_slo={summary.peer: 4 * index + 4 for index, summary in enumerate(best)} if with_extras else {},
        memory={summary.peer: summary.median for summary in best} if with_extras else {},
        runs=runs,
    )


OURS = run("pasture", "pasture", 10.0)
UNIFIED = run("llama-server", "llama-server (unified)", 50.0)
STREAMS = run("llama-server", "llama-server (streams)", 40.0)


def printed(report: Report) -> str:
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


def test_the_first_shared_answer_is_the_first_whose_prompt_was_partly_there() -> None:
    shared = run("pasture", "pasture", 8.0)
    assert first_shared(shared) == 2.0
    cold = dataclasses.replace(shared, traces=tuple(dataclasses.replace(trace, cached_tokens=0) for trace in shared.traces))
    assert first_shared(cold) is None


def test_the_better_variant_of_a_peer_counts() -> None:
    best = best_variants(summarise([OURS, UNIFIED, STREAMS]))
    assert [summary.label for summary in best] == ["pasture", "llama-server (streams)"]


def test_a_variant_with_errors_does_not_win_by_being_fast() -> None:
    broken = run("llama-server", "llama-server (broken)", 1.0, error="no")
    assert best_variants(summarise([broken, UNIFIED]))[0].label == "llama-server (unified)"


def test_repeats_become_medians() -> None:
    summary = summarise([run("p", "p", wall) for wall in (3.0, 9.0, 4.0)])[0]
    assert (summary.runs, summary.median.wall_seconds) == (3, 4.0)


def test_the_table_shows_ratios_and_names_what_it_leaves_out() -> None:
    text = printed(report(OURS, UNIFIED, STREAMS))
    wall = next(line for line in text.splitlines() if " wall " in line)
    assert "0.25x" in wall
    assert "not shown, slower: llama-server (unified), wall 50.0 s" in text


def test_who_failed_is_not_called_slower() -> None:
    text = printed(report(OURS, UNIFIED, run("llama-server", "llama-server (broken)", 1.0, error="no")))
    assert "not shown, failed 1 of its requests: llama-server (broken)" in text
    assert "slower" not in text


def test_errors_users_and_memory_are_told() -> None:
    text = printed(report(OURS, run("isolated", "isolated", 20.0, error="HTTP 400: too long"), with_extras=True))
    assert "HTTP 400: too long" in text
    assert "users inside ttft_p95 <= 4 s" in text
    assert "0.50x" in text
    assert "1 MiB" in text


def test_the_json_holds_every_run(tmp_path: Path) -> None:
    report(OURS, STREAMS).write_json(tmp_path / "result.json")
    value = orjson.loads((tmp_path / "result.json").read_bytes())
    assert [entry["label"] for entry in value["runs"]] == ["pasture", "llama-server (streams)"]
    assert value["runs"][0]["traces"][0]["first"] == 5.0
    assert value["best"][1]["median"]["wall_seconds"] == 40.0


def test_the_page_asks_no_other_host(tmp_path: Path) -> None:
    write_page(report(OURS, STREAMS, with_extras=True), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", html)
    assert "&lt;small&gt;.gguf" in html
    assert html.count("Plotly.newPlot(") == 8


def test_secrets_stay_out_of_the_settings() -> None:
    described = describe(BenchOptions(api_key="hush", model=Path("/models/a.gguf"), threads=3))
    assert "hush" not in str(described)
    assert (described["model"], described["threads"]) == ("a.gguf", "3")


def test_tight_memory_gives_each_system_what_it_needs() -> None:
    workload = build(BenchOptions(users=4))
    seen = figures([exchange(0.0, 1.0, 2.0)], Outside(workload_cells=1000, peak_cells=900))
    assert cells_needed("pasture", seen, workload) == 1280
    assert cells_needed("isolated", seen, workload) == 4 * 256


@pytest.mark.parametrize(
    ("ours", "theirs", "text"), [(4.0, 10.0, "-60 %"), (3.0, 2.0, "+50 %"), (None, 2.0, ""), (1.0, 0.0, "")]
)
def test_changes_in_per_cent(ours: float | None, theirs: float, text: str) -> None:
    assert change(ours, theirs) == text


def test_users_that_fit_share_the_opening() -> None:
    chats = [dataclasses.replace(CHAT, user=user) for user in ("Ada", "Bruno")]
    exchanges = [dataclasses.replace(exchange(0.0, 1.0, 2.0), chat=chat, prompt_tokens=1098) for chat in chats]
    pool = Run("p", "p", figures(exchanges, Outside(workload_cells=1000 + 100 + 100)), traces(exchanges))
    assert users_that_fit(2000, pool) == 10
    assert users_that_fit(900, pool) == 0
    untold = Run("p", "p", figures(exchanges), traces(exchanges))
    assert users_that_fit(2000, untold) is None


def test_one_late_answer_makes_a_user_late() -> None:
    exchanges = [exchange(0.0, 1.0), exchange(1.0, 7.0)]
    late = Run("p", "p", figures(exchanges), traces(exchanges))
    assert promptly_served(late) == 0
    assert promptly_served(run("p", "p", 4.0)) == 1


def test_what_is_around_decode_is_a_share_of_the_step() -> None:
    assert StepCost(10, 2.0, 1.9, 0.01, 0.2).share == pytest.approx(0.05)


def test_tokens_are_counted_inside_the_window_even_when_chunks_hold_several() -> None:
    assert tokens_between(exchange(0.0, 1.0, 2.0, 3.0, 4.0), 2.0, 4.0) == 2
    assert tokens_between(exchange(0.0, error="no"), 0.0, 9.0) == 0
