"""Replies bound to a JSON schema, a grammar or a pattern: which tokens may come next.

The work is llguidance's (Earley's parser over lexemes that are derivatives of regexes, and a trie of the vocabulary:
https://github.com/guidance-ai/llguidance): tens of microseconds a token. Its tokenizer is made from the vocabulary's bytes when
the first constraint comes. Tokens that are no text (control tokens, ends of generation) can never be a part of a reply's text.

A compiled constraint is copied for each reply that it binds. The copies share the lexer's states, so what one reply had to find
out, the next ones know; when they have used up their limit of states, it is compiled anew.

Constraints come from strangers, so everything is limited: the text, the compiler's work, the work and the states a token. One
thing llguidance does not limit is how many patterns must hold of one string: each doubles the work, twenty take seconds, sixty
all memory. `check_schema` counts them before they get there. GBNF cannot say it; llguidance's own grammars can, so they are not
taken. Nor does it limit how far it follows references: a thousand of them end the process on a usual stack, so that it compiles
on one that the longest text allowed cannot fill. What is too much is a RequestError, at once or in the middle of the reply.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Final
from weakref import WeakValueDictionary

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from numpy.typing import NDArray

from pasture.core.errors import PastureError, RequestError
from pasture.core.ports import Vocabulary
from pasture.core.values import Constraint, ConstraintKind

MAX_BYTES = 65_536
"""of a constraint's text"""
MAX_GBNF_BYTES = 32_768
"""the converter is written in Python, and takes seconds for a grammar twice as long"""
MAX_DEPTH = 96
"""of objects and arrays in each other, in a schema"""
MAX_MEETING_PATTERNS = 8
"""in a schema that asks for several things of one value"""

_KEPT = 16
"""compiled constraints that nobody uses at present"""
_STACK_BYTES = 128 << 20
"""of addresses; memory only as far as it is used. The worst that was found needs 16 KiB for 31 bytes of text"""
_starting = threading.Lock()
_SILENT = 0
_REASON_CHARACTERS = 300
_WHITESPACE = r"[ ]|\n{1,2}[ \t]{0,20}"
"""between the parts of JSON: as in llama.cpp's grammars, so that no reply is whitespace for ever"""

_LIMITS: Final = LLParserLimits(
    step_lexer_fuel=100_000,  # 7 ms
    max_lexer_states=20_000,  # 40 MB
    max_grammar_size=100_000,
    verbose_errors=False,
)

_COMBINING = frozenset({"anyOf", "oneOf", "$ref", "$dynamicRef", "$recursiveRef"})
_HARMLESS = _COMBINING | {
    "type", "allOf", "title", "description", "default", "examples", "$defs", "definitions", "$schema", "$id", "$comment",
    "x-guidance",
}  # fmt: skip
"""keywords beside a combining one that ask for nothing more of the value"""


class Compiled:
    """A constraint in the library's form, from which each reply gets its copy."""

    __slots__ = ("__weakref__", "matcher")

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher


class Grammars:
    """The constraints of one vocabulary. Any thread may `prepare`; the engine's asks for guides."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: WeakValueDictionary[Constraint, Compiled] = WeakValueDictionary()
        self._kept: deque[Compiled] = deque(maxlen=_KEPT)

    def prepare(self, constraint: Constraint) -> Compiled:
        """Compile the constraint, unless that is done; it stays at hand while the result is held.

        Takes up to a second. Raises RequestError for what cannot be compiled.
        """
        with self._lock:
            found = self._compiled.get(constraint)
        if found is None:
            found = self._compile(constraint)
            with self._lock:
                self._compiled[constraint] = found
                self._kept.append(found)
        return found

    def guide(self, constraint: Constraint, drawn: Sequence[int] = ()) -> Guide:
        """A reply's way through the constraint, behind the tokens `drawn`. Raises RequestError."""
        guide = Guide(self, constraint, self.prepare(constraint).matcher.deep_copy(), self._vocabulary.n_tokens)
        for token in drawn:
            guide.accept(token)
        return guide

    def forget(self, constraint: Constraint) -> None:
        """Have it compiled anew the next time."""
        with self._lock:
            found = self._compiled.pop(constraint, None)
            if found is not None and found in self._kept:
                self._kept.remove(found)

    def _compile(self, constraint: Constraint) -> Compiled:
        try:
            grammar, tokenizer = _grammar(constraint), self._tokenizer
            matcher = _on_a_deep_stack(lambda: _matcher(tokenizer, grammar))
        except (ValueError, RecursionError) as error:
            raise _refusal(constraint, str(error)) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a bug of the library's, which is no Exception
                raise
            raise _refusal(constraint, "the compiler failed on it") from error
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        return Compiled(matcher)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not self._vocabulary.end_tokens:
            raise RequestError("the model has no token that ends a reply, so none can be bound to a form")
        words = _Words(self._vocabulary)
        words.made = LLTokenizer(words, n_vocab=self._vocabulary.n_tokens, eos_token=sorted(self._vocabulary.end_tokens))  # type: ignore[arg-type]  # it asks for these attributes, not for the class
        return words.made


class Guide:
    """Where one reply is in its constraint. Thread: the engine's."""

    def __init__(self, grammars: Grammars, constraint: Constraint, matcher: LLMatcher, n_tokens: int) -> None:
        self._grammars = grammars
        self._constraint = constraint
        self._matcher = matcher
        self._n_tokens = n_tokens
        self._bits = np.zeros((n_tokens + 31) // 32, np.uint32)

    @property
    def ended(self) -> bool:
        """Nothing may follow but the end."""
        return self._matcher.is_stopped()

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, `(n_tokens,) bool`: the ends of generation where the reply may be over.

        Raises RequestError where finding out takes more than the limits allow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        return np.unpackbits(self._bits.view(np.uint8), count=self._n_tokens, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """The reply goes on with the token. Raises RequestError for one that is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def refusal(self, reason: str) -> RequestError:
        return RequestError(f"the reply cannot go on in the form that it must have: {reason}", param=self._constraint.param)

    def _check(self) -> None:
        if self._matcher.is_error():
            self._grammars.forget(self._constraint)
            raise self.refusal(_reason(self._matcher.get_error()))


class _Words:
    """The vocabulary as llguidance asks for it: each token's bytes, which are no text, and texts as tokens."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens = range(vocabulary.n_tokens)
        self._vocabulary = vocabulary
        self.made: LLTokenizer | None = None
        self.bos_token_id = vocabulary.bos
        self.eos_token_id = min(vocabulary.end_tokens)
        self.tokens = [vocabulary.piece(token, special=True) for token in tokens]
        self.special_token_ids = [t for t in tokens if t in vocabulary.end_tokens or not vocabulary.piece(t)]

    def __call__(self, text: str) -> list[int]:
        """How the model would write text that must come next; exactly the text, which some tokenizers put a space before.

        An error here would end the process's thread in the library, so there is none.
        """
        try:
            tokens = self._vocabulary.tokenize(text, add_special=False, parse_special=False)
        except PastureError:  # the model is being freed
            tokens = []
        if b"".join(map(self.tokens.__getitem__, tokens)) == text.encode():
            return tokens
        return self.made.greedy_tokenize(text) if self.made is not None else []


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    matcher = LLMatcher(tokenizer, grammar, log_level=_SILENT, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # finds out whether there is a way into it, and warms it up
    return matcher


def _on_a_deep_stack(work: Callable[[], LLMatcher]) -> LLMatcher:
    """What `work` returns, or raises, on a thread made for it."""
    result: Future[LLMatcher] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    with _starting:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="pasture-compile", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return result.result()


def _grammar(constraint: Constraint) -> str:
    """The constraint as the library reads it. Raises ValueError, RecursionError or RequestError for what is none."""
    most = MAX_GBNF_BYTES if constraint.kind is ConstraintKind.GBNF else MAX_BYTES
    if len(constraint.text.encode("utf-8", "surrogatepass")) > most:
        raise ValueError(f"it has more than {most} bytes")
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            schema = json.loads(constraint.text)
            check_schema(schema)
            if constraint.before or constraint.after:
                return LLMatcher.grammar_from_lark(_framed(constraint.before, schema, constraint.after))
            return LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_pattern": _WHITESPACE})
        case ConstraintKind.GBNF:
            return LLMatcher.grammar_from_lark(_lark(constraint.text))
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)


def _framed(before: str, schema: dict[str, object], after: str) -> str:
    """JSON that suits the schema between two texts."""
    schema = {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
    texts = [json.dumps(text, ensure_ascii=False) for text in (before, after)]
    return f"start: {texts[0]} framed {texts[1]}\nframed: %json {json.dumps(schema)}"


def _lark(gbnf: str) -> str:
    try:
        return gbnf_to_lark(gbnf)
    except RecursionError:
        raise
    except Exception as error:  # the converter raises nothing more exact
        raise ValueError(str(error)) from error


def check_schema(schema: object) -> None:
    """Raises ValueError for a schema that is nested too deeply, or in which too many patterns may have to hold at once."""
    n_patterns, meeting = 0, False
    for depth, node in _nodes(schema):
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(node, dict):
            own = _patterns(node)
            n_patterns += own
            meeting = meeting or own > 1 or _asks_for_several(node)
    if meeting and n_patterns > MAX_MEETING_PATTERNS:
        raise ValueError(
            f"it has {n_patterns} patterns, and combines some (allOf; patternProperties; anyOf, oneOf or $ref beside more);"
            f" such a schema may have {MAX_MEETING_PATTERNS}"
        )


def _nodes(schema: object) -> Iterator[tuple[int, object]]:
    """Every value in the schema, and how deep it lies."""
    waiting = [(1, schema)]
    while waiting:
        depth, node = waiting.pop()
        yield depth, node
        if isinstance(node, dict | list) and depth <= MAX_DEPTH:
            waiting += [(depth + 1, inner) for inner in (node.values() if isinstance(node, dict) else node)]


def _patterns(node: dict[str, object]) -> int:
    """How many patterns a schema has of its own, not counting those of schemas in it."""
    names = node.get("patternProperties")
    own = sum(isinstance(node.get(keyword), str) for keyword in ("pattern", "format"))
    return own + (len(names) if isinstance(names, dict) else 0)


def _asks_for_several(node: dict[str, object]) -> bool:
    """Whether two schemas must hold of one value."""
    parts = node.get("allOf")
    combined = len(node.keys() & _COMBINING) + (len(parts) if isinstance(parts, list) else 0)
    return combined > 1 or (combined == 1 and not node.keys() <= _HARMLESS)


def _refusal(constraint: Constraint, reason: str) -> RequestError:
    return RequestError(f"this {constraint.kind.value} cannot be used: {_reason(reason)}", param=constraint.param)


def _reason(error: str) -> str:
    """The library's words without what it says of its own state."""
    told = error.split("\n<", 1)[0].strip() or "no reason given"
    return told if len(told) <= _REASON_CHARACTERS else told[:_REASON_CHARACTERS] + " ..."
