"""Candidate selection and log probabilities, against the obvious way to compute them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pasture.core.values import SamplingParams
from pasture.engine.sampling import _window_tokens, log_probabilities, top_ids


def make_row(n_vocab: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(n_vocab).astype(np.float32)


@given(st.integers(1, 20_000), st.integers(1, 300), st.integers(0, 1 << 30))
def test_the_largest_are_found(n_vocab: int, count: int, seed: int) -> None:
    row = make_row(n_vocab, seed)
    count = min(count, n_vocab)
    expected = set(np.argsort(-row, kind="stable")[:count].tolist())
    assert expected <= set(top_ids(row, count).tolist())


def test_the_list_is_short_without_ties() -> None:
    assert len(top_ids(make_row(49_152, 1), 40)) <= 80


@given(st.integers(1, 100), st.integers(0, 9))
def test_ties_and_bans_lose_nothing(count: int, seed: int) -> None:
    row = np.round(make_row(8192, seed))
    row[:4000] = -np.inf
    kept = np.sort(row[top_ids(row, count)])[::-1][:count]
    assert np.array_equal(kept, np.sort(row)[::-1][:count])


def test_log_probabilities_are_a_log_softmax() -> None:
    row = make_row(5000, 3) * 4
    expected = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    found = log_probabilities(row, 17, 5)
    assert found.logprob == pytest.approx(expected[17], abs=1e-5)
    best = np.argsort(-row)[:5]
    assert [token for token, _ in found.top] == best.tolist()
    assert [value for _, value in found.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert log_probabilities(row, 17, 0).top == ()


@pytest.mark.parametrize(("asked", "window"), [(-1, 512), (0, 0), (64, 64), (2**31 - 1, 512)])
def test_no_window_is_longer_than_a_context(asked: int, window: int) -> None:
    params = SamplingParams(repeat_penalty=1.1, repeat_last_n=asked, dry_multiplier=0.8, dry_penalty_last_n=asked)
    assert _window_tokens(params, 512) == window
