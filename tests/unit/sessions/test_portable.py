from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import pytest

from pasture.core.errors import RequestError
from pasture.sessions.portable import DIGEST_BYTES, MAX_HEADER_BYTES, Portable, dump, load

SESSION = Portable("model", [{"role": "user", "content": "hü"}], (1, 2, 3), b"kv" * 50, {"tools": []}, {"k": 1})


def test_what_goes_in_comes_out() -> None:
    found = load(dump(SESSION))
    assert found.messages == SESSION.messages
    assert tuple(found.tokens) == (1, 2, 3)
    assert (found.blocks, found.context, found.metadata, found.model) == (SESSION.blocks, {"tools": []}, {"k": 1}, "model")


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    data = dump(SESSION)
    for i in range(len(data)):
        with pytest.raises(RequestError):
            load(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(RequestError):
            load(data[:i])
    with pytest.raises(RequestError):
        load(data + b"x")


def test_a_transcript_without_end_is_refused_before_it_is_read() -> None:
    endless = replace(SESSION, metadata={"k": "x" * MAX_HEADER_BYTES})
    with pytest.raises(RequestError, match="transcript"):
        load(dump(endless))


def test_what_no_answer_could_hold_is_refused() -> None:
    data = dump(SESSION).replace("hü".encode(), b"\\ud8")[:-DIGEST_BYTES]
    with pytest.raises(RequestError, match="cannot be read"):
        load(data + blake2b(data, digest_size=DIGEST_BYTES).digest())
