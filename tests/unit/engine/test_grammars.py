"""Constraints over small vocabularies: what may come next, where it ends, and what is too much."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from random import Random

import numpy as np
import pytest

from pasture.core.errors import RequestError
from pasture.core.ports import Vocabulary
from pasture.core.values import Constraint, ConstraintKind
from pasture.engine import grammars
from pasture.engine.fake import FakeVocabulary
from pasture.engine.grammars import Grammars, check_schema
from tests.unit.stub_service import EOS, SPECIAL, ByteVocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value), "response_format")


def gbnf(text: str) -> Constraint:
    return Constraint(ConstraintKind.GBNF, text, "grammar")


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text, "guided_regex")


@pytest.fixture
def made() -> Grammars:
    return Grammars(ByteVocabulary())


def written(vocabulary: Vocabulary, constraint: Constraint, seed: int) -> bytes:
    """A reply that chance writes within the constraint."""
    guide, chance, text = Grammars(vocabulary).guide(constraint), Random(seed), b""
    while not guide.ended:
        allowed = [int(token) for token in np.flatnonzero(guide.allowed())]
        assert allowed
        token = chance.choice(allowed)
        if token in vocabulary.end_tokens:
            break
        guide.accept(token)
        text += vocabulary.piece(token)
    return text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocabulary", [ByteVocabulary(), FakeVocabulary()])
def test_whatever_is_drawn_suits_the_schema(vocabulary: Vocabulary, seed: int) -> None:
    person = json.loads(written(vocabulary, schema(PERSON), seed))
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


@pytest.mark.parametrize(
    ("constraint", "replies"),
    [
        (gbnf('root ::= "yes" | "no" [a-b]'), {b"yes", b"noa", b"nob"}),
        (regex("[ab]|cd"), {b"a", b"b", b"cd"}),
        (schema({"enum": ["x", 1, None]}), {b'"x"', b"1", b"null"}),
    ],
)
def test_grammars_and_patterns(constraint: Constraint, replies: set[bytes]) -> None:
    assert {written(ByteVocabulary(), constraint, seed) for seed in range(60)} == replies


def test_the_end_is_possible_where_the_reply_may_be_over_and_alone_where_it_must(made: Grammars) -> None:
    guide = made.guide(regex("ab?"))
    ends = sorted(ByteVocabulary().end_tokens)
    assert np.flatnonzero(guide.allowed()).tolist() == [ord("a")]
    guide.accept(ord("a"))
    assert not guide.ended
    assert np.flatnonzero(guide.allowed()).tolist() == [ord("b"), *ends]
    guide.accept(ord("b"))
    assert guide.ended
    assert np.flatnonzero(guide.allowed()).tolist() == ends


def test_an_end_that_was_drawn_is_the_end(made: Grammars) -> None:
    guide = made.guide(regex("a*"))
    guide.accept(EOS)
    assert guide.ended


def test_text_can_stand_around_what_suits_a_schema() -> None:
    framed = Constraint(ConstraintKind.JSON_SCHEMA, '{"enum": ["x", 1]}', before='say "', after='"\n')
    assert {written(ByteVocabulary(), framed, seed) for seed in range(20)} == {b'say ""x""\n', b'say "1"\n'}


def test_no_control_token_is_text(made: Grammars) -> None:
    allowed = np.flatnonzero(made.guide(regex("(.|\n)+")).allowed())
    assert not set(allowed.tolist()) & set(SPECIAL.values())


def test_a_guide_goes_on_behind_what_was_drawn_elsewhere(made: Grammars) -> None:
    here, there = made.guide(regex("abc")), made.guide(regex("abc"), [ord("a"), ord("b")])
    for token in b"ab":
        here.accept(token)
    assert np.array_equal(here.allowed(), there.allowed())
    with pytest.raises(RequestError, match="cannot go on"):
        made.guide(regex("abc"), [ord("x")])


def test_replies_under_one_constraint_do_not_touch_each_other(made: Grammars) -> None:
    first, second = made.guide(regex("ab")), made.guide(regex("ab"))
    first.accept(ord("a"))
    assert np.flatnonzero(second.allowed()).tolist() == [ord("a")]


def test_a_vocabulary_that_puts_spaces_before_words_still_writes_what_must_come(made: Grammars) -> None:
    class Spaced(ByteVocabulary):
        def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            return super().tokenize(" " + text, add_special=add_special, parse_special=parse_special)

    assert written(Spaced(), regex("abc[de]"), 1) in (b"abcd", b"abce")


def test_what_is_compiled_stays_at_hand_while_somebody_holds_it(made: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    held = made.prepare(regex("held"))
    for i in range(grammars._KEPT + 1):
        made.prepare(regex(f"other{i}"))
    monkeypatch.setattr(made, "_compile", lambda constraint: pytest.fail("compiled again"))
    assert made.prepare(regex("held")) is held
    made.prepare(regex("other3"))


def test_a_constraint_travels() -> None:
    constraint = schema(PERSON)
    assert pickle.loads(pickle.dumps(constraint)) == constraint
    assert Constraint(constraint.kind, constraint.text, "json_schema") == constraint, "whatever the client called it"


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        (schema({"type": "colour"}), "Invalid type: colour"),
        (schema({"not": {"type": "string"}}), "Unimplemented"),
        (schema({"$ref": "https://example.org/schema"}), "retriev"),
        (schema({"$ref": "#/nowhere"}), "does not exist"),
        (schema({"$ref": "#"}), "cannot be used"),
        (schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (schema({"enum": []}), "Unsatisfiable"),
        (Constraint(ConstraintKind.JSON_SCHEMA, "{"), "Expecting"),
        (gbnf('root := "a"'), "Expected ::="),
        (gbnf('other ::= "a"'), "root"),
        (gbnf("root ::= root"), "cannot be used"),
        (gbnf("root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion"),
        (gbnf('start: /a.*/ & /b.*/ & ~"c"'), "Expected ::="),
        (regex("("), "unclosed group"),
        (regex("(" * 1000 + ")" * 1000), "cannot be used"),
        (regex("x" * 70_000), "65536 bytes"),
        (gbnf(f'root ::= "{"x" * 40_000}"'), "32768 bytes"),
        (schema({"const": "x" * 70_000}), "bytes"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(made: Grammars, constraint: Constraint, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        made.prepare(constraint)
    assert caught.value.param == constraint.param
    assert len(str(caught.value)) < 500


def test_a_model_that_cannot_end_a_reply_is_bound_to_nothing() -> None:
    with pytest.raises(RequestError, match="no token that ends"):
        Grammars(ByteVocabulary(end_tokens=frozenset())).prepare(regex("a"))


def test_a_constraint_that_comes_to_need_too_much_ends_and_is_compiled_anew(made: Grammars) -> None:
    greedy = regex("|".join(f".*{letter}.{{{n}}}" for letter, n in zip("abcdefgh", range(20, 100, 10), strict=True)))
    guide, chance = made.guide(greedy), Random(1)
    before = made.prepare(greedy)

    def wander() -> None:
        while not guide.ended:
            assert guide.allowed()[ord("a")]
            guide.accept(chance.choice(b"abcdefgh"))

    with pytest.raises(RequestError, match="cannot go on"):
        wander()
    assert made.prepare(greedy) is not before


def nested(depth: int) -> object:
    inner: object = {"type": "string"}
    for _ in range(depth // 2):
        inner = {"properties": {"a": inner}}
    return inner


def several(n: int) -> list[object]:
    return [{"type": "string", "pattern": f"a.{{{i}}}"} for i in range(n)]


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (nested(200), "deep"),
        ({"allOf": several(60)}, "60 patterns"),
        ({"anyOf": several(60), "pattern": "b"}, "61 patterns"),
        ({"$ref": "#/$defs/a", "anyOf": [], "$defs": {"a": {"anyOf": several(9)}}}, "9 patterns"),
        ({"patternProperties": {f"a.{{{i}}}": True for i in range(60)}}, "60 patterns"),
    ],
)
def test_a_schema_that_could_take_all_memory_is_refused_unread(made: Grammars, refused: object, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        made.prepare(schema(refused))


@pytest.mark.parametrize(
    "link",
    [
        lambda there: {"items": there},
        lambda there: {"properties": {"a": there}},
        lambda there: {"additionalProperties": there},
        lambda there: {"anyOf": [{"properties": {"a": there}}, there]},
        lambda there: {"allOf": [there]},
        lambda there: there,
    ],
)
def test_a_long_way_through_references_ends_no_process(made: Grammars, link: Callable[[object], object]) -> None:
    places: dict[str, object] = {"end": {"type": "null"}}
    while len(json.dumps(places)) < grammars.MAX_BYTES - 200:
        there = {"$ref": f"#/$/{len(places) - 1 or 'end'}"}
        places[str(len(places))] = link(there)
    with suppress(RequestError):
        made.prepare(schema({"$": places, "$ref": f"#/$/{len(places) - 1}"}))
    assert made.prepare(regex("a"))


def test_a_bug_of_the_library_is_a_refusal(made: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object) -> None:
        raise PanicException

    monkeypatch.setattr(grammars, "_matcher", panic)
    with pytest.raises(RequestError, match="the compiler failed"):
        made.prepare(regex("a"))


def test_patterns_of_different_values_are_as_many_as_one_likes() -> None:
    check_schema({"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "^a"} for i in range(100)}})
    check_schema({"anyOf": several(60), "title": "One of them"})
    check_schema({"allOf": several(8)})
