from __future__ import annotations

import pytest

from pasture.core.errors import RequestError
from pasture.text.prompts import Prompts
from tests.unit.stub_service import BOS, CHAT_TEMPLATE, EOS, SPECIAL, ByteVocabulary

HELLO = [{"role": "user", "content": "Hi"}]


def test_a_conversation_becomes_tokens_with_its_special_ones() -> None:
    tokens = Prompts(ByteVocabulary()).chat(HELLO)
    start, end = SPECIAL["<|im_start|>"], SPECIAL["<|im_end|>"]
    assert tokens == (start, *b"user\nHi", end, *b"\n", start, *b"assistant\n")


def test_the_bos_token_is_added_where_the_model_wants_one() -> None:
    assert Prompts(ByteVocabulary(add_bos=True)).text("Hi") == (BOS, *b"Hi")
    assert Prompts(ByteVocabulary(add_bos=False)).text("Hi") == tuple(b"Hi")


def test_a_template_that_prints_bos_gets_no_second_one() -> None:
    prompts = Prompts(ByteVocabulary(add_bos=True, chat_template="{{ bos_token }}" + CHAT_TEMPLATE))
    assert prompts.chat(HELLO).count(BOS) == 1
    without = Prompts(ByteVocabulary(add_bos=True))
    assert without.chat(HELLO).count(BOS) == 1


def test_a_template_of_ones_own_replaces_the_models() -> None:
    prompts = Prompts(ByteVocabulary(), "{{ messages[0].content }}{{ eos_token }}")
    assert prompts.chat(HELLO) == (*b"Hi", EOS)


def test_a_model_without_bos_and_template_still_chats() -> None:
    prompts = Prompts(ByteVocabulary(chat_template=None, bos=None, eos=None, add_bos=False))
    assert prompts.chat(HELLO)[0] == SPECIAL["<|im_start|>"]


@pytest.mark.parametrize("tokens", [[], [260], [-1], [1, 2, 10**12]])
def test_token_ids_that_do_not_exist_are_refused(tokens: list[int]) -> None:
    with pytest.raises(RequestError) as caught:
        Prompts(ByteVocabulary()).tokens(tokens)
    assert caught.value.param == "prompt"


def test_an_empty_text_is_refused_unless_bos_stands_for_it() -> None:
    with pytest.raises(RequestError, match="empty"):
        Prompts(ByteVocabulary()).text("")
    assert Prompts(ByteVocabulary(add_bos=True)).text("") == (BOS,)


def test_detokenizing_writes_special_tokens_out() -> None:
    prompts = Prompts(ByteVocabulary())
    assert prompts.detokenize([BOS, *"é".encode(), EOS]) == "<s>é</s>"
    assert prompts.detokenize([]) == ""
    with pytest.raises(RequestError):
        prompts.detokenize([999])
