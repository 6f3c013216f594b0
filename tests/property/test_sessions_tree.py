"""Sessions and responses against plain lists: whatever is done to them, they hold what lists hold, and nothing is left over."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from pasture.sessions.state import State
from pasture.sessions.values import Counters, Message
from tests.unit.sessions.conftest import check_books

TEXTS = st.lists(st.sampled_from("abc"), max_size=3)
CONTEXTS = st.sampled_from([{}, {"tools": ["one"]}, {"tools": ["one", "two"]}])


def messages(texts: list[str]) -> list[Message]:
    return [{"role": "user", "content": one} for one in texts]


class TreeMachine(RuleBasedStateMachine):
    sessions: Bundle[str] = Bundle("sessions")
    responses: Bundle[str] = Bundle("responses")

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.tenant = self.state.tenants.create("acme")
        self.said: dict[str, list[str]] = {}
        self.contexts: dict[str, dict[str, object]] = {}
        self.answered: dict[str, list[str]] = {}
        self.n_responses = 0

    @rule(target=sessions, texts=TEXTS, context=CONTEXTS)
    def create(self, texts: list[str], context: dict[str, object]) -> str:
        made = self.state.sessions.create(self.tenant, messages(texts), context=context, metadata={"a": "b"}).session_id
        self.said[made] = texts
        self.contexts[made] = context
        return made

    @rule(session=sessions, more=TEXTS)
    def go_on(self, session: str, more: list[str]) -> None:
        self._advance(session, [*self.said[session], *more])

    @rule(session=sessions, texts=TEXTS, context=CONTEXTS)
    def replace(self, session: str, texts: list[str], context: dict[str, object]) -> None:
        self._advance(session, texts, context)
        self.contexts[session] = context

    @rule(target=sessions, session=sessions, n=st.integers(1, 3))
    def fork(self, session: str, n: int) -> MultipleResults[str]:
        made = [fork.session_id for fork in self.state.sessions.fork(self.tenant, session, n)]
        for fork in made:
            self.said[fork] = self.said[session]
            self.contexts[fork] = self.contexts[session]
        return multiple(*made)

    @rule(session=sessions, n=st.integers(0, 9))
    def truncate(self, session: str, n: int) -> None:
        n = min(n, len(self.said[session]))
        self.state.sessions.truncate(self.tenant, session, n)
        self.said[session] = self.said[session][:n]

    @rule(session=consumes(sessions))
    def delete(self, session: str) -> None:
        self.state.sessions.delete(self.tenant, session)
        del self.said[session]

    @rule(target=responses, texts=TEXTS.filter(len))
    def answer(self, texts: list[str]) -> str:
        return self._answer(None, texts)

    @rule(target=responses, previous=responses, texts=TEXTS.filter(len))
    def answer_again(self, previous: str, texts: list[str]) -> str:
        return self._answer(previous, texts)

    @rule(response=consumes(responses))
    def forget(self, response: str) -> None:
        self.state.responses.delete(self.tenant, response)
        del self.answered[response]

    @invariant()
    def everything_is_as_it_was_said(self) -> None:
        for session, texts in self.said.items():
            found, said = self.state.sessions.open(self.tenant, session)
            assert (found.context, said) == (self.contexts[session], messages(texts))
        for response, texts in self.answered.items():
            assert self.state.responses.open(self.tenant, response)[1] == messages(texts)

    @invariant()
    def every_pointer_is_counted(self) -> None:
        check_books(self.state)

    def teardown(self) -> None:
        for session in list(self.said):
            self.delete_now(session)
        for response in self.answered:
            self.state.responses.delete(self.tenant, response)
        assert self.state.kept() == {"sessions": 0, "responses": 0, "turns": 0, "bytes": 0}
        self.state.close()

    def delete_now(self, session: str) -> None:
        self.state.sessions.delete(self.tenant, session)

    def _advance(self, session: str, texts: list[str], context: dict[str, object] | None = None) -> None:
        used = Counters(1)
        self.state.sessions.advance(self.tenant, session, messages(texts), n_tokens=len(texts), used=used, context=context)
        self.said[session] = texts

    def _answer(self, previous: str | None, texts: list[str]) -> str:
        self.n_responses += 1
        name = f"r{self.n_responses}"
        self.state.responses.add(self.tenant, name, {"n": name}, messages(texts), previous)
        self.answered[name] = [*(self.answered[previous] if previous else []), *texts]
        return name


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
