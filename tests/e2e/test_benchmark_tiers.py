"""The benchmarks of the tiers from end to end, without a model: a restart, and an engine for which fetching loses."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import orjson
import pytest

from pasture.bench import restart
from pasture.bench.options import BenchOptions
from pasture.bench.tiers import FAST_CONVERSATIONS, FAST_TOKENS, WITH, WITHOUT, too_fast
from pasture.cli.tiers import fast_service


def test_after_a_restart_conversations_are_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BenchOptions(out=tmp_path, max_tokens=4, serve_flags=("--fake-engine",), as_json=True)
    assert restart.main(options) == 0
    waits = {wait["phase"]: wait for wait in orjson.loads((tmp_path / "result.json").read_bytes())["waits"]}
    assert orjson.loads(capsys.readouterr().out)["waits"] == list(waits.values())
    assert waits[restart.COLD]["cached_tokens"] < 64, "nothing but what the warm-up has in common"
    for phase in (restart.NEXT_TURN, restart.SAME, restart.ANOTHER, restart.BOTH):
        assert waits[phase]["cached_tokens"] > 0.9 * waits[restart.COLD]["prompt_tokens"]


async def test_where_fetching_loses_the_gate_refuses() -> None:
    outcomes = []
    for side in (WITH, WITHOUT):
        with closing(fast_service(side)) as service:
            outcomes.append(await too_fast(service, side, seed=1))
    tiered, bare = outcomes
    assert tiered.refusals > 0
    assert tiered.computed_tokens > FAST_CONVERSATIONS * FAST_TOKENS, "more than once: what was not fetched was computed"
    assert bare.computed_tokens - tiered.computed_tokens < FAST_TOKENS, "not even to find out was a conversation fetched"
