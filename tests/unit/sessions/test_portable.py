from __future__ import annotations

import pytest

from pasture.core.errors import RequestError
from pasture.sessions.portable import Portable, dump, load

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
