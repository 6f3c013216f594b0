"""However bytes are cut into tokens, the text is that of all bytes at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pasture.text.detokenizer import Detokenizer

# characters of every length, their fragments, and bytes that never occur in UTF-8
CHUNKS = st.lists(
    st.one_of(
        st.binary(max_size=5),
        st.text(max_size=5).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from([b"\xf0\x9f", b"\x90\x91", b"\xe2\x82", b"\xac", b"\xed\xa0\x80", b"\xf4\x90", b"\xff", b"\xc0\x80"]),
    ),
    max_size=12,
)


@given(CHUNKS)
def test_text_is_the_text_of_all_bytes_at_once(chunks: list[bytes]) -> None:
    detokenizer = Detokenizer()
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.finish()
    assert text == b"".join(chunks).decode("utf-8", errors="replace")


@given(st.text(max_size=30), st.data())
def test_valid_text_never_shows_a_replacement_on_the_way(text: str, data: st.DataObject) -> None:
    encoded = text.replace("\ufffd", "").encode("utf-8", "ignore")
    detokenizer = Detokenizer()
    while encoded:
        size = data.draw(st.integers(1, len(encoded)))
        assert "\ufffd" not in detokenizer.push(encoded[:size])
        encoded = encoded[size:]
    assert detokenizer.finish() == ""
