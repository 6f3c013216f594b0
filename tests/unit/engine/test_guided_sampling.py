"""The sampler under a constraint, with the real library and made-up rows: every way to draw stays within it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pasture.core.errors import RequestError
from pasture.core.values import Constraint, ConstraintKind, SamplingParams
from pasture.engine.grammars import Grammars
from pasture.engine.sampling import LlamaSampler
from pasture.engine.vocabulary import LlamaVocabulary
from pasture.engine.vocabulary_only import load_vocabulary
from tests.gguf_factory import write_llama

N_CONTEXT = 512
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA))
EVERY_WAY = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repeat_penalty=1.5),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_k=3),
    SamplingParams(seed=3, top_k=0, top_p=1, min_p=0, temperature=2),
    SamplingParams(seed=4, typical_p=0.5),
    SamplingParams(seed=5, mirostat=1),
    SamplingParams(seed=6, mirostat=2),
    SamplingParams(seed=7, repeat_penalty=1.3, presence_penalty=1, dry_multiplier=1),
    SamplingParams(seed=8, logit_bias={5: 50.0}),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> LlamaVocabulary:
    return load_vocabulary(str(write_llama(Path(tmp_path_factory.mktemp("model")) / "tiny.gguf")))


@pytest.fixture(scope="module")
def grammars(vocabulary: LlamaVocabulary) -> Grammars:
    return Grammars(vocabulary)


def row(step: int, n_vocab: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return (np.random.default_rng(step).standard_normal(n_vocab) * 4).astype(np.float32)


def draw(sampler: LlamaSampler, vocabulary: LlamaVocabulary, first: int = 0) -> list[int]:
    """Tokens up to the end of the reply, drawn from rows that differ."""
    tokens: list[int] = []
    while not sampler.ended and len(tokens) < 300:
        given = row(first + len(tokens), vocabulary.n_tokens)
        before = given.copy()
        tokens.append(sampler.draw(given))
        assert np.array_equal(given, before), "log probabilities are those of the raw row"
    return [token for token in tokens if token not in vocabulary.end_tokens]


@pytest.mark.parametrize("params", EVERY_WAY)
def test_every_way_to_draw_stays_within_the_schema(
    vocabulary: LlamaVocabulary, grammars: Grammars, params: SamplingParams
) -> None:
    sampler = LlamaSampler(params, [5, 6, 7], vocabulary, N_CONTEXT, 0, grammars.guide(FORM))
    assert not sampler.takes_row_as_it_is
    reply = json.loads(b"".join(map(vocabulary.piece, draw(sampler, vocabulary))))
    assert reply.keys() == {"name", "age"}
    assert isinstance(reply["age"], int)
    sampler.close()


@pytest.mark.parametrize("params", [params for params in EVERY_WAY if not params.mirostat])
def test_a_constrained_reply_goes_on_where_another_sampler_stopped(
    vocabulary: LlamaVocabulary, grammars: Grammars, params: SamplingParams
) -> None:
    whole = draw(LlamaSampler(params, [5, 6], vocabulary, N_CONTEXT, 0, grammars.guide(FORM)), vocabulary)
    at = len(whole) // 2
    guide = grammars.guide(FORM, whole[:at])
    rest = draw(LlamaSampler(params, [5, 6, *whole[:at]], vocabulary, N_CONTEXT, at, guide), vocabulary, at)
    assert rest == whole[at:]


def test_the_best_that_is_allowed_is_what_greed_takes(vocabulary: LlamaVocabulary, grammars: Grammars) -> None:
    digits = Constraint(ConstraintKind.REGEX, "[0-9]")
    sampler = LlamaSampler(SamplingParams(temperature=0), [5], vocabulary, N_CONTEXT, 0, grammars.guide(digits))
    given = row(1, vocabulary.n_tokens)
    allowed = np.flatnonzero(grammars.guide(digits).allowed())
    assert {vocabulary.piece(int(token)) for token in allowed} == {b"%d" % digit for digit in range(10)}
    assert sampler.draw(given) == allowed[given[allowed].argmax()]
    assert sampler.ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_leaves_nothing_is_an_error_and_no_other_token(
    vocabulary: LlamaVocabulary, grammars: Grammars, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(vocabulary.n_tokens), -np.inf))
    sampler = LlamaSampler(params, [5], vocabulary, N_CONTEXT, 0, grammars.guide(FORM))
    with pytest.raises(RequestError, match="logit_bias"):
        sampler.draw(row(1, vocabulary.n_tokens))
