"""Figures, distinct tokens, service levels, counters: what numbers are made of."""

from __future__ import annotations

import dataclasses

import pytest

from pasture.bench import counters
from pasture.bench.client import Chat, Endpoint, Exchange
from pasture.bench.distinct import PromptTokens, Trie, distinct_prompt_tokens
from pasture.bench.measure import Figures, Outside, figures, medians, quantile
from pasture.bench.options import Limit
from pasture.bench.slo import PRECISION, Outlook, largest, within
from tests.unit.bench.stub_openai import StubServer, serving


def exchange(sent: float, *times: float, text: str = "a b", prompt: str = "x y", error: str | None = None) -> Exchange:
    chat = Chat("Ada", ({"role": "user", "content": prompt},), 2)
    ended = times[-1] if times else sent
    return Exchange(
        chat, sent, ended, times, text, prompt_tokens=10, cached_tokens=4, completion_tokens=len(times), error=error
    )


def test_quantiles_lie_between_ranks() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.95) == 9.5
    assert quantile([7.0], 0.95) == 7.0
    assert quantile([], 0.5) is None


def test_figures_of_a_run() -> None:
    run = figures([exchange(0.0, 1.0, 1.5, 3.0), exchange(1.0, 4.0, 4.5)], Outside(distinct_tokens=10, peak_bytes=5))
    assert run.wall_seconds == 4.5
    assert run.ttft_mean_seconds == 2.0
    assert run.latency_mean_seconds == 3.25
    assert run.itl_max_seconds == 1.5
    assert run.itl_p50_seconds == 0.5
    assert run.generated_tokens == 5
    assert run.tokens_per_second == pytest.approx(5 / 4.5)
    assert (run.prompt_tokens, run.computed_tokens, run.computed_ratio) == (20, 12, 1.2)
    assert (run.longest_tokens, run.peak_bytes, run.errors) == (13, 5, 0)


def test_failed_requests_count_as_errors_and_nothing_else() -> None:
    run = figures([exchange(0.0, 1.0), exchange(0.0, error="no")])
    assert (run.requests, run.errors, run.computed_tokens) == (2, 1, 6)
    nothing = figures([exchange(0.0, error="no")])
    assert nothing.ttft_mean_seconds is None
    assert nothing.itl_max_seconds is None


def test_a_server_that_does_not_tell_its_cache_has_no_computed_tokens() -> None:
    untold = dataclasses.replace(exchange(0.0, 1.0), cached_tokens=None)
    assert figures([untold, exchange(0.0, 1.0)]).computed_tokens is None


def test_medians_go_field_by_field_and_errors_add_up() -> None:
    runs = [figures([exchange(0.0, end)]) for end in (1.0, 5.0, 2.0)] + [
        figures([exchange(0.0, 2.0), exchange(0.0, error="no")])
    ]
    middle = medians(runs)
    assert middle.wall_seconds == 2.0
    assert (middle.errors, middle.requests) == (1, 5)
    assert middle.distinct_tokens is None
    with pytest.raises(ValueError, match="no run"):
        medians([])


def test_a_trie_counts_what_it_did_not_hold() -> None:
    trie = Trie()
    assert trie.insert([1, 2, 3]) == 3
    assert trie.insert([1, 2, 4, 5]) == 2
    assert trie.insert([1, 2]) == 0
    assert trie.n_tokens == 5


@pytest.mark.parametrize("template_route", [True, False])
async def test_distinct_tokens_share_beginnings_and_replies_but_not_a_replys_last_token(template_route: bool) -> None:
    async with serving(StubServer(template_route=template_route)) as stub:
        tokens = await PromptTokens.of(stub.endpoint)
        assert tokens is not None
        first = exchange(0.0, 1.0, prompt="s1 s2 q1", text="r1 r2")
        follow_up = exchange(2.0, 3.0, prompt="s1 s2 q1 r1 r2 q2", text="t1")
        twin = exchange(2.5, 3.5, prompt="s1 s2 q1", text="r1 u1")
        failed = exchange(0.0, prompt="never counted", error="no")
        distinct, cells = await distinct_prompt_tokens(exchange(0.0, prompt="s1 w"), [follow_up, failed, twin, first], tokens)
    assert distinct == 2 + 2 + 1
    assert cells == len({"s1", "w", "s2", "q1", "r1", "r2", "q2"})


async def test_without_a_tokenizer_nothing_is_counted() -> None:
    assert await PromptTokens.of(Endpoint("127.0.0.1", 9)) is None


@pytest.mark.parametrize("ceiling", [1, 7, 16])
async def test_bisection_finds_every_limit_in_few_runs(ceiling: int) -> None:
    for limit in range(ceiling + 3):
        tried: list[int] = []

        async def holds(users: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(users)
            return users <= limit

        assert await largest(holds, ceiling) == min(limit, ceiling)
        assert len(tried) == len(set(tried)) <= 9


def test_a_level_is_kept_only_without_errors_and_with_figures() -> None:
    limits = (Limit("ttft_p95", 2.0),)
    assert within(figures([exchange(0.0, 2.0)]), limits)
    assert not within(figures([exchange(0.0, 2.1)]), limits)
    assert not within(figures([exchange(0.0, 1.0), exchange(0.0, error="no")]), limits)
    assert not within(figures([exchange(0.0, 1.0)]), (Limit("itl_p95", 2.0),))
    assert not within(figures([]), limits)


def test_counters_are_summed_over_labels_and_kept_by_label() -> None:
    page = '# TYPE used gauge\nused{state="idle"} 3\nused{state="running"} 4\n# TYPE steps counter\nsteps_total 7\n'
    parsed = counters.parse(page)
    assert (parsed["used"], parsed["used:idle"], parsed["steps_total"]) == (7, 3, 7)
    assert counters.increase({"steps_total": 2.0}, parsed, "steps_total") == 5
    assert counters.increase({}, parsed, "unknown") is None
    assert counters.parse("<html>") == {}


def test_levels_are_read_by_name() -> None:
    run: Figures = figures([exchange(0.0, 2.0)])
    assert run.level("ttft_p95") == 2.0
    assert run.level("itl_max") is None


async def test_a_large_number_is_found_to_a_share_of_itself() -> None:
    for limit in (40, 57, 63, 64, 99):
        tried: list[int] = []

        async def holds(users: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(users)
            return users <= limit

        assert min(limit, 64) * (1 - PRECISION) <= await largest(holds, 64) <= limit
        assert len(tried) <= 10


def test_a_run_is_lost_when_it_cannot_keep_a_limit_any_more() -> None:
    outlook = Outlook((Limit("ttft_p95", 1.0),), 40)
    assert [outlook.lost(exchange(0.0, 5.0)) for _ in range(3)] == [False, False, True], "two of forty may be late"
    assert Outlook((Limit("ttft_p95", 1.0),), 1).lost(exchange(0.0, 1.5))
    mean = Outlook((Limit("latency_mean", 1.0),), 4)
    assert [mean.lost(exchange(0.0, 0.5, 3.0)), mean.lost(exchange(0.0, 0.5, 1.5))] == [False, True]
    wall = Outlook((Limit("wall", 10.0),), 4)
    assert [wall.lost(exchange(0.0, 9.0)), wall.lost(exchange(5.0, 11.0))] == [False, True]
    assert Outlook((Limit("itl_max", 1.0),), 4).lost(exchange(0.0, 1.0, 3.0))
    assert Outlook((Limit("itl_p95", 1.0),), 4).lost(exchange(0.0, error="no"))
    assert not Outlook((Limit("itl_p95", 1.0),), 4).lost(exchange(0.0, 1.0, 3.0)), "how many gaps will come is not known"


@pytest.mark.parametrize("n_requests", [1, 2, 19, 20, 21, 40])
def test_what_is_lost_would_have_been_outside(n_requests: int) -> None:
    limits = (Limit("ttft_p95", 1.0),)
    for n_late in range(n_requests + 1):
        outlook = Outlook(limits, n_requests)
        late = [exchange(0.0, 2.0) for _ in range(n_late)]
        lost = [outlook.lost(one) for one in late]
        if any(lost):
            assert not within(figures([*late, *(exchange(0.0, 0.1) for _ in range(n_requests - n_late))]), limits)
