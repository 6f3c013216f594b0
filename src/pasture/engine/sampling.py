"""Drawing the next token: llama.cpp's sampler chain, fed with as few candidates as give the same result.

A chain over 49,000 candidates costs milliseconds a row, most of it moving tokens that top-k drops at once. So numpy picks
the candidates first. With top-k on, only these can survive: the k best raw logits among the tokens no penalty touches, and
every token that a penalty may touch (those in its window). The best `k + window` raw logits together with the window are a
superset of that, so the chain (penalties, DRY, top-k, typical, top-p, min-p, temperature, draw) sees a short list and
returns what it would have returned for the whole vocabulary. Without top-k, and for mirostat, the chain gets all of it.
Greedy without penalties is numpy's argmax. A biased row is a copy with the bias added; a constrained one is a copy, too, in
which what the constraint does not allow is minus infinity, and no candidate.

A sampler owns its C chain and its random state; it draws from one row of logits and nothing else, so a request's tokens do
not depend on who shares its batch. Thread: the engine's.
"""

from __future__ import annotations

import ctypes
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pasture.core.errors import EngineError, RequestError
from pasture.core.values import Sampler, SamplingParams, TokenLogprobs
from pasture.engine.bindings import lib
from pasture.engine.grammars import Guide
from pasture.engine.vocabulary import LlamaVocabulary

Logits = NDArray[np.float32]

_CANDIDATE = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
_GROUP_TOKENS = 64
"""`top_ids` looks at the maxima of strided groups of at most this many tokens"""
_FEW_TOKENS = 256
"""so many that a constraint leaves are not worth a search for the best of them"""
_DRY_BREAKERS = (b"\n", b":", b'"', b"*")
_MIROSTAT_CANDIDATES = 100


def top_ids(row: Logits, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest values, in no order; a few more where values tie at the edge.

    The count-th largest of the group maxima is a lower bound of the count-th largest value: count groups reach it. So one
    comparison of the row with the bound leaves a short list.
    """
    if count >= len(row):
        return np.arange(len(row))
    width = min(_GROUP_TOKENS, len(row) // (count * 4))
    if width < 2:
        bound = np.partition(row, len(row) - count)[len(row) - count]
        return np.flatnonzero(row >= bound)
    n_groups = len(row) // width
    maxima = row[: n_groups * width].reshape(width, n_groups).max(axis=0)
    bound = np.partition(maxima, n_groups - count)[n_groups - count]
    found = np.flatnonzero(row >= bound)
    if len(found) > count * 2:
        values = row[found]
        found = found[values >= np.partition(values, len(values) - count)[len(values) - count]]
    return found


def log_probabilities(row: Logits, token: int, n_top: int) -> TokenLogprobs:
    """Log-softmax of the raw row: of `token`, and of the `n_top` most probable."""
    peak = row.max()
    total = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
    top: tuple[tuple[int, float], ...] = ()
    if n_top:
        ids = top_ids(row, n_top)
        ids = ids[np.argsort(-row[ids], kind="stable")][:n_top]
        top = tuple((int(i), float(row[i]) - total) for i in ids)
    return TokenLogprobs(float(row[token]) - total, top)


class LlamaSampler(Sampler):
    """One request's sampler. `prompt` fills the penalty and DRY windows. Raises RequestError on impossible parameters."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocabulary: LlamaVocabulary,
        n_context: int,
        n_drawn: int = 0,
        guide: Guide | None = None,
    ) -> None:
        """`n_drawn`: draws that another sampler with these parameters has made; this one makes those that follow.

        `guide`: the constraint's, behind those draws; the sampler's from here on.
        """
        self._chain: Any = None
        self._guide = guide
        if params.mirostat not in (0, 1, 2):
            raise RequestError(f"there is no mirostat version {params.mirostat}", param="mirostat")
        self._n_vocab = vocabulary.n_tokens
        self._bias = _bias_of(params, self._n_vocab)
        self._top_k = 1 if params.temperature <= 0 else params.top_k
        self._needs_all = params.temperature > 0 and (params.mirostat != 0 or not 0 < params.top_k < self._n_vocab)
        window = _window_tokens(params, n_context)
        self._recent: deque[int] | None = deque(prompt[-window:], window) if window else None
        self.is_greedy = params.temperature <= 0 and not window
        """argmax of the row (as far as bias and constraint leave it) is all there is to do"""
        if not self.is_greedy:
            self._make_chain(params, vocabulary, n_context, n_drawn)
            for token in self._recent or ():
                lib.llama_sampler_accept(self._chain, token)

    @property
    def takes_row_as_it_is(self) -> bool:
        return self._bias is None and self._guide is None

    @property
    def ended(self) -> bool:
        """The constraint allows nothing behind what was drawn."""
        return self._guide is not None and self._guide.ended

    def draw(self, row: Logits) -> int:
        """The next token after `row`, accepted at once. `row` is left as it was. Raises RequestError where none is possible."""
        token = self._choose(row if self.takes_row_as_it_is else self._changed(row))
        if self._guide is not None:
            self._guide.accept(token)
        return token

    def _changed(self, row: Logits) -> Logits:
        """A copy of the row as bias and constraint want it."""
        row = row.copy()
        if self._bias is not None:
            ids, added = self._bias
            row[ids] += added
        if self._guide is not None:
            row[~self._guide.allowed()] = -np.inf
            if row.max() == -np.inf:
                raise self._guide.refusal("logit_bias bans every token that it allows")
        return row

    def _choose(self, row: Logits) -> int:
        if self.is_greedy:
            return int(row.argmax())
        candidates = self._candidates(row)
        array = lib.llama_token_data_array()
        array.data = ctypes.cast(candidates.ctypes.data, lib.llama_token_data_p)
        array.size = len(candidates)
        array.selected = -1
        array.sorted = False
        lib.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise EngineError("the sampler chain selected nothing")
        token = int(array.data[array.selected].id)
        if self._recent is not None:
            lib.llama_sampler_accept(self._chain, token)
            self._recent.append(token)
        return token

    def close(self) -> None:
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    def __del__(self) -> None:
        self.close()

    def _candidates(self, row: Logits) -> NDArray[np.void]:
        ids = self._likely(row)
        if self._guide is not None:
            ids = ids[row[ids] > -np.inf]
        candidates = np.empty(len(ids), _CANDIDATE)
        candidates["id"] = ids
        candidates["logit"] = row[ids]
        candidates["p"] = 0
        return candidates

    def _likely(self, row: Logits) -> NDArray[np.intp]:
        """Tokens that the chain has to see."""
        if self._guide is not None and np.count_nonzero(allowed := row > -np.inf) <= _FEW_TOKENS:
            return np.flatnonzero(allowed)
        if self._needs_all:
            return np.arange(self._n_vocab)
        if self._recent:
            touched = np.fromiter(set(self._recent), np.intp)
            return np.union1d(top_ids(row, self._top_k + len(touched)), touched)
        return top_ids(row, self._top_k)

    def _make_chain(self, params: SamplingParams, vocabulary: LlamaVocabulary, n_context: int, n_drawn: int) -> None:
        seed = secrets.randbits(32) if params.seed is None else params.seed & 0xFFFFFFFF
        links: list[Any] = []
        if self._recent is not None:
            links += _penalties(params, vocabulary, n_context)
        if params.temperature <= 0:
            links.append(lib.llama_sampler_init_greedy())
        elif params.mirostat:
            links.append(lib.llama_sampler_init_temp(params.temperature))
            links.append(_mirostat(params, self._n_vocab, seed))
        else:
            if params.top_k > 0:
                links.append(lib.llama_sampler_init_top_k(params.top_k))
            if params.typical_p < 1:
                links.append(lib.llama_sampler_init_typical(params.typical_p, 1))
            if params.top_p < 1:
                links.append(lib.llama_sampler_init_top_p(params.top_p, 1))
            if params.min_p > 0:
                links.append(lib.llama_sampler_init_min_p(params.min_p, 1))
            links.append(lib.llama_sampler_init_temp(params.temperature))
            links.append(_drawing(seed, n_drawn))
        chain_params = lib.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        self._chain = lib.llama_sampler_chain_init(chain_params)
        for link in links:
            lib.llama_sampler_chain_add(self._chain, link)


def _bias_of(params: SamplingParams, n_vocab: int) -> tuple[NDArray[np.intp], Logits] | None:
    if not params.logit_bias:
        return None
    ids = np.fromiter(params.logit_bias.keys(), np.intp)
    if bool(np.any((ids < 0) | (ids >= n_vocab))):
        raise RequestError(f"logit_bias names a token outside of the vocabulary of {n_vocab}", param="logit_bias")
    return ids, np.fromiter(params.logit_bias.values(), np.float32)


def _window_tokens(params: SamplingParams, n_context: int) -> int:
    """How many of the latest tokens some penalty looks at."""
    penalised = params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    if penalised and params.repeat_penalty <= 0:
        raise RequestError(f"repeat_penalty is {params.repeat_penalty}; it must be above 0", param="repeat_penalty")
    repeat = _resolve(params.repeat_last_n, n_context) if penalised else 0
    dry = _resolve(params.dry_penalty_last_n, n_context) if params.dry_multiplier and params.dry_base >= 1 else 0
    return max(repeat, dry)


def _resolve(last_n: int, n_context: int) -> int:
    """More than a context there is nothing to look back at; the library makes room for all that it is told."""
    return n_context if last_n < 0 else min(last_n, n_context)


def _penalties(params: SamplingParams, vocabulary: LlamaVocabulary, n_context: int) -> list[Any]:
    breakers = (ctypes.c_char_p * len(_DRY_BREAKERS))(*_DRY_BREAKERS)
    return [
        lib.llama_sampler_init_penalties(
            vocabulary.n_tokens,
            _resolve(params.repeat_last_n, n_context),
            params.repeat_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        ),
        lib.llama_sampler_init_dry(
            vocabulary.handle,
            params.dry_multiplier,
            params.dry_base,
            params.dry_allowed_length,
            _resolve(params.dry_penalty_last_n, n_context) if params.dry_multiplier else 0,
            breakers,
            len(_DRY_BREAKERS),
        ),
    ]


def _drawing(seed: int, n_drawn: int) -> Any:
    """The link that draws, behind `n_drawn` draws: each takes one random number, however many candidates are left."""
    link = lib.llama_sampler_init_dist(seed)
    candidates = np.zeros(1, _CANDIDATE)
    array = lib.llama_token_data_array()
    array.data = ctypes.cast(candidates.ctypes.data, lib.llama_token_data_p)
    for _ in range(n_drawn):
        array.size, array.selected = 1, 0
        lib.llama_sampler_apply(link, ctypes.byref(array))
    return link


def _mirostat(params: SamplingParams, n_vocab: int, seed: int) -> Any:
    if params.mirostat == 1:
        return lib.llama_sampler_init_mirostat(n_vocab, seed, params.mirostat_tau, params.mirostat_eta, _MIROSTAT_CANDIDATES)
    return lib.llama_sampler_init_mirostat_v2(seed, params.mirostat_tau, params.mirostat_eta)
