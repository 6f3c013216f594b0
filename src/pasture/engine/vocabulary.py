"""Text <-> tokens through a loaded model.

`LlamaVocabulary` reads every token's bytes once at load, so that `piece` is a list lookup and needs no C call afterwards.
Only `tokenize` still enters the library; llama.cpp's tokenizer reads immutable tables, so any thread may call it while the
model is loaded. It owns nothing: whoever frees the model closes the vocabulary first, which waits for calls under way on other
threads and refuses those that come later.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from pasture.core.errors import EngineError, ShuttingDown
from pasture.engine.bindings import Handle, lib, text_of

_PIECE_BYTES = 64


class LlamaVocabulary:
    """The vocabulary of one model. Implements `pasture.core.ports.Vocabulary`."""

    def __init__(self, model: Handle) -> None:
        self._handle = lib.llama_model_get_vocab(model)
        self._changed = threading.Condition()
        self._n_calls = 0
        self._closed = False
        self._n_tokens = int(lib.llama_vocab_n_tokens(self._handle))
        self._pieces = [self._read_piece(token, special=False) for token in range(self._n_tokens)]
        self._special_pieces = {
            token: self._read_piece(token, special=True)
            for token in range(self._n_tokens)
            if not self._pieces[token] or lib.llama_vocab_is_control(self._handle, token)
        }
        self._end_tokens = frozenset(token for token in range(self._n_tokens) if lib.llama_vocab_is_eog(self._handle, token))
        self._bos = self._known(lib.llama_vocab_bos(self._handle))
        self._eos = self._known(lib.llama_vocab_eos(self._handle))
        self._add_bos = bool(lib.llama_vocab_get_add_bos(self._handle))
        self._chat_template = text_of(cast("bytes | None", lib.llama_model_chat_template(model, None)))

    @property
    def handle(self) -> Handle:
        return cast(Handle, self._handle)

    @property
    def n_tokens(self) -> int:
        return self._n_tokens

    @property
    def end_tokens(self) -> frozenset[int]:
        return self._end_tokens

    @property
    def bos(self) -> int | None:
        return self._bos

    @property
    def eos(self) -> int | None:
        return self._eos

    @property
    def add_bos(self) -> bool:
        return self._add_bos

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Raises ShuttingDown once the model is being freed, EngineError for what the library refuses."""
        raw = text.encode("utf-8", "surrogatepass")
        room = len(raw) + 8
        with self._model_held():
            for _ in range(2):
                tokens = (ctypes.c_int32 * room)()
                found = lib.llama_tokenize(self._handle, raw, len(raw), tokens, room, add_special, parse_special)
                if found >= 0:
                    return tokens[:found]
                room = -found
        raise EngineError(f"the tokenizer refused a text of {len(raw)} bytes")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if not 0 <= token < self._n_tokens:
            raise IndexError(f"token {token} is not in the vocabulary of {self._n_tokens}")
        if special:
            return self._special_pieces.get(token) or self._pieces[token]
        return self._pieces[token]

    def close(self) -> None:
        """Wait for what is being tokenised, and take no more; the bytes of tokens stay readable."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._n_calls)

    @contextmanager
    def _model_held(self) -> Iterator[None]:
        with self._changed:
            if self._closed:
                raise ShuttingDown("the model is being freed")
            self._n_calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_calls -= 1
                self._changed.notify_all()

    def _known(self, token: int) -> int | None:
        return token if 0 <= token < self._n_tokens else None

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        room = _PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            length = lib.llama_token_to_piece(self._handle, token, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length
        return b""
