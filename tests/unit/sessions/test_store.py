from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pasture.core.errors import Conflict, NotFound, RateLimited, RequestError
from pasture.sessions.state import State
from pasture.sessions.values import Counters, Message, Tenant
from tests.unit.sessions.conftest import Time, check_books, rows, statements, stored_bytes

USED = Counters(1, 10, 4, 3)


def say(*texts: str) -> list[Message]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def tenant(state: State) -> Tenant:
    return state.tenants.create("acme")


@pytest.fixture
def other(state: State) -> Tenant:
    return state.tenants.create("other")


def test_a_session_holds_what_was_said_and_counts_what_it_cost(state: State, tenant: Tenant, clock: Time) -> None:
    made = state.sessions.create(tenant, say("a"), name="mine", context={"tools": [1]}, metadata={"k": "v"})
    clock.now += 5
    state.sessions.advance(tenant, made.session_id, say("a", "b", "c", "d"), n_tokens=44, used=USED)
    state.sessions.advance(tenant, made.session_id, say("a", "b", "c", "d", "e", "f"), n_tokens=55, used=USED)
    found, messages = state.sessions.open(tenant, made.session_id)
    assert messages == say("a", "b", "c", "d", "e", "f")
    assert found.counters == Counters(2, 20, 8, 6)
    assert (found.n_messages, found.n_tokens, found.last_used - found.created) == (6, 55, 5)
    assert (found.context, found.metadata, found.name) == ({"tools": [1]}, {"k": "v"}, "mine")
    assert state.sessions.page(tenant) == (state.sessions.get(tenant, made.session_id),)
    assert rows(state, "turns") == 3


def test_forks_cost_a_row_each_and_go_their_own_ways(state: State, tenant: Tenant) -> None:
    made = state.sessions.create(tenant, say("a", "b"))
    forks = state.sessions.fork(tenant, made.session_id, 32)
    assert rows(state, "turns") == 1
    assert {fork.parent for fork in forks} == {made.session_id}
    assert {fork.parent_messages for fork in forks} == {2}
    assert state.sessions.get(tenant, forks[3].session_id) == forks[3]
    state.sessions.advance(tenant, forks[0].session_id, say("a", "b", "x"), n_tokens=1, used=USED)
    state.sessions.advance(tenant, forks[1].session_id, say("a", "b", "y"), n_tokens=1, used=USED)
    said = [state.sessions.messages(tenant, session.session_id) for session in (made, forks[0], forks[1])]
    assert said == [say("a", "b"), say("a", "b", "x"), say("a", "b", "y")]
    state.sessions.delete(tenant, made.session_id)
    assert state.sessions.messages(tenant, forks[2].session_id) == say("a", "b")
    for fork in forks:
        state.sessions.delete(tenant, fork.session_id)
    assert rows(state, "turns") == rows(state, "sessions") == stored_bytes(state) == 0


def test_an_edited_history_branches_where_it_was_edited(state: State, tenant: Tenant) -> None:
    made = state.sessions.create(tenant, say("a"))
    state.sessions.advance(tenant, made.session_id, say("a", "b"), n_tokens=1, used=USED)
    state.sessions.advance(tenant, made.session_id, say("a", "B", "c"), n_tokens=1, used=USED)
    assert state.sessions.messages(tenant, made.session_id) == say("a", "B", "c")
    assert rows(state, "turns") == 2, "what nobody points at any more is gone"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_truncating_goes_back_to_any_message(state: State, tenant: Tenant, n: int) -> None:
    made = state.sessions.create(tenant, say("a", "b", "c"))
    state.sessions.advance(tenant, made.session_id, say("a", "b", "c", "d", "e"), n_tokens=9, used=USED)
    assert state.sessions.truncate(tenant, made.session_id, n).n_messages == n
    assert state.sessions.messages(tenant, made.session_id) == say("a", "b", "c", "d", "e")[:n]
    with pytest.raises(RequestError):
        state.sessions.truncate(tenant, made.session_id, n + 1)
    state.sessions.delete(tenant, made.session_id)
    assert rows(state, "turns") == stored_bytes(state) == 0


def test_what_is_somebody_elses_is_the_same_as_nothing(state: State, tenant: Tenant, other: Tenant) -> None:
    theirs = state.sessions.create(tenant, say("secret")).session_id
    missing = "sess_" + "0" * 32
    calls: list[Callable[[Tenant, str], object]] = [
        lambda t, i: state.sessions.get(t, i),
        lambda t, i: state.sessions.open(t, i),
        lambda t, i: state.sessions.fork(t, i),
        lambda t, i: state.sessions.copy(t, i, t),
        lambda t, i: state.sessions.truncate(t, i, 0),
        lambda t, i: state.sessions.pin(t, i, True),
        lambda t, i: state.sessions.delete(t, i),
        lambda t, i: state.sessions.advance(t, i, [], n_tokens=0, used=USED),
    ]
    for call in calls:
        said = []
        for session_id in (theirs, missing):
            with pytest.raises(NotFound) as caught:
                call(other, session_id)
            said.append(str(caught.value).replace(session_id, "ID"))
        assert said[0] == said[1]
    assert state.sessions.page(other) == ()
    assert state.sessions.messages(tenant, theirs) == say("secret")


def test_copies_belong_to_the_other_tenant(state: State, tenant: Tenant, other: Tenant) -> None:
    made = state.sessions.create(tenant, say("a"), metadata={"k": 1})
    copied = state.sessions.copy(tenant, made.session_id, other)
    assert state.sessions.messages(other, copied.session_id) == say("a")
    assert copied.metadata == {"k": 1}
    with pytest.raises(NotFound):
        state.sessions.get(tenant, copied.session_id)


def test_a_session_that_went_on_meanwhile_is_neither_overwritten_nor_deleted(state: State, tenant: Tenant) -> None:
    made = state.sessions.create(tenant, say("a"))
    state.sessions.advance(tenant, made.session_id, say("a", "b"), n_tokens=1, used=USED, head=made.head)
    with pytest.raises(Conflict):
        state.sessions.advance(tenant, made.session_id, say("a", "c"), n_tokens=1, used=USED, head=made.head)
    with pytest.raises(Conflict):
        state.sessions.delete(tenant, made.session_id, made.head)
    assert state.sessions.messages(tenant, made.session_id) == say("a", "b")
    state.sessions.delete(tenant, made.session_id, state.sessions.get(tenant, made.session_id).head)
    assert rows(state, "sessions") == rows(state, "turns") == 0


def test_names_are_unique_in_a_tenant_only(state: State, tenant: Tenant, other: Tenant) -> None:
    state.sessions.create(tenant, name="n")
    state.sessions.create(other, name="n")
    with pytest.raises(Conflict):
        state.sessions.create(tenant, name="n")


def test_nothing_grows_without_bound(state: State) -> None:
    state.tenants.create("small", max_sessions=3, max_pinned=1, max_transcript_bytes=200)
    tenant = state.tenants.get("small")
    made = state.sessions.create(tenant, say("a"))
    with pytest.raises(RateLimited):
        state.sessions.fork(tenant, made.session_id, 3)
    forks = state.sessions.fork(tenant, made.session_id, 2)
    with pytest.raises(RateLimited):
        state.sessions.create(tenant)
    state.sessions.pin(tenant, made.session_id, True)
    state.sessions.pin(tenant, made.session_id, True)
    with pytest.raises(RateLimited):
        state.sessions.pin(tenant, forks[0].session_id, True)
    before = stored_bytes(state)
    with pytest.raises(RateLimited):
        state.sessions.advance(tenant, made.session_id, say("a", "b" * 300), n_tokens=1, used=USED)
    assert stored_bytes(state) == before, "what went too far is undone"
    assert state.sessions.messages(tenant, made.session_id) == say("a")


def name(state: State, tenant: Tenant, name: str, *messages: Message) -> str:
    """A request that is complete and only named its session."""
    return state.sessions.go_on_named(tenant, name, messages, n_tokens=len(messages), used=USED)


def names(state: State, tenant: Tenant) -> set[str | None]:
    return {session.name for session in state.sessions.page(tenant)}


def test_a_name_makes_a_session_once_and_goes_on_with_it(state: State, tenant: Tenant, other: Tenant) -> None:
    made = name(state, tenant, "n", *say("a", "b"))
    assert name(state, tenant, "n", *say("a", "b", "c", "d")) == made
    assert name(state, other, "n", *say("a")) != made
    found, messages = state.sessions.open(tenant, made)
    assert (found.name, found.n_messages, found.n_tokens, found.counters) == ("n", 4, 4, Counters(2, 20, 8, 6))
    assert messages == say("a", "b", "c", "d")
    assert rows(state, "turns") == 3
    mine = state.sessions.create(tenant, name="mine").session_id
    assert name(state, tenant, "mine", *say("a")) == mine


def test_sessions_that_were_only_named_make_way_for_those_that_somebody_asks_for(state: State, clock: Time) -> None:
    tenant = state.tenants.create("small", max_sessions=5)
    mine = state.sessions.create(tenant, say("mine"), name="mine").session_id
    for i in range(4):
        clock.now += 1
        name(state, tenant, f"n{i}", *say(f"a{i}", "b"))
    clock.now += 1
    name(state, tenant, "n0", *say("a0", "b", "c"))
    clock.now += 1
    name(state, tenant, "n4", *say("a4", "b"))
    assert names(state, tenant) == {"mine", "n0", "n2", "n3", "n4"}, "the longest unused has made way"
    pinned = next(session for session in state.sessions.page(tenant) if session.name == "n2")
    state.sessions.pin(tenant, pinned.session_id, True)
    asked = state.sessions.create(tenant, say("asked"))
    assert names(state, tenant) == {"mine", "n0", "n2", "n4", None}
    last = next(session for session in state.sessions.page(tenant) if session.name == "n0")
    with pytest.raises(RateLimited):
        state.sessions.fork(tenant, last.session_id, 2)
    assert names(state, tenant) == {"mine", "n0", "n2", "n4", None}, "what would not do is left as it is"
    (fork,) = state.sessions.fork(tenant, last.session_id, 1)
    assert names(state, tenant) == {"mine", "n0", "n2", None}, "the one that is forked stays, though it is older"
    assert state.sessions.messages(tenant, fork.session_id) == say("a0", "b", "c")
    state.sessions.create(tenant)
    for call in (lambda: state.sessions.create(tenant), lambda: name(state, tenant, "late", *say("a"))):
        with pytest.raises(RateLimited):
            call()
    assert state.sessions.messages(tenant, mine) == say("mine")
    assert state.sessions.messages(tenant, asked.session_id) == say("asked")
    assert rows(state, "sessions") == 5
    check_books(state)


def test_a_name_whose_conversation_has_no_room_leaves_no_session(state: State) -> None:
    tenant = state.tenants.create("small", max_sessions=2, max_transcript_bytes=200)
    kept = [name(state, tenant, n, *say("a", "b")) for n in ("one", "two")]
    with pytest.raises(RateLimited):
        name(state, tenant, "three", *say("a", "b" * 300))
    assert {session.session_id for session in state.sessions.page(tenant)} == set(kept), "nor does any make way for it"
    check_books(state)


TOOLS = {"tools": [{"type": "function", "function": {"name": "look", "description": "x" * 1000}}]}


def test_what_a_prompt_is_made_from_counts_once_however_many_sessions_have_it(state: State, tenant: Tenant) -> None:
    made = state.sessions.create(tenant, say("a"), context=TOOLS)
    n_bytes = stored_bytes(state)
    assert n_bytes > 1000
    forks = state.sessions.fork(tenant, made.session_id, 256)
    assert state.sessions.create(tenant, context=TOOLS).session_id
    assert stored_bytes(state) < n_bytes + 1000, "257 more have none of their own"
    assert state.sessions.open(tenant, forks[7].session_id)[0].context == TOOLS
    check_books(state)
    other = {"tools": [{"name": "another"}]}
    for fork in forks:
        state.sessions.advance(tenant, fork.session_id, say("a", "b"), n_tokens=1, used=USED, context=other)
    assert state.sessions.open(tenant, made.session_id)[0].context == TOOLS
    assert state.sessions.open(tenant, forks[7].session_id)[0].context == other
    check_books(state)
    for session in state.sessions.page(tenant, limit=1000):
        state.sessions.delete(tenant, session.session_id)
    assert rows(state, "contexts") == stored_bytes(state) == 0


def test_what_a_prompt_is_made_from_has_no_more_room_than_what_is_said(state: State) -> None:
    tenant = state.tenants.create("small", max_transcript_bytes=1500)
    made = state.sessions.create(tenant, say("a"), context=TOOLS)
    large = {"tools": [{"name": "y" * 500}]}
    calls: list[Callable[[], object]] = [
        lambda: state.sessions.create(tenant, context=large),
        lambda: state.sessions.create(tenant, metadata={"k": "v" * 500}),
        lambda: state.sessions.go_on_named(tenant, "n", say("a"), n_tokens=1, used=USED, context=large),
        lambda: state.sessions.check_room(tenant, (), (), large),
    ]
    for call in calls:
        with pytest.raises(RateLimited):
            call()
        check_books(state)
    state.sessions.check_room(tenant, (), (), TOOLS)
    state.sessions.advance(tenant, made.session_id, say("a"), n_tokens=1, used=USED, context=large)
    assert rows(state, "contexts") == 1, "one takes the other's place"


def test_what_makes_way_takes_its_context_and_metadata_along(state: State, clock: Time) -> None:
    tenant = state.tenants.create("small", max_sessions=2)
    for i in range(6):
        clock.now += 1
        context = {"tools": [{"name": "first" if i < 4 else "second"}]}
        state.sessions.go_on_named(tenant, f"n{i}", say("a"), n_tokens=1, used=USED, context=context)
        check_books(state)
    assert rows(state, "contexts") == 1


def test_one_tenants_contexts_are_not_anothers(state: State, tenant: Tenant, other: Tenant) -> None:
    made = [state.sessions.create(one, context=TOOLS) for one in (tenant, other)]
    assert rows(state, "contexts") == 2
    state.sessions.delete(tenant, made[0].session_id)
    assert state.sessions.open(other, made[1].session_id)[0].context == TOOLS
    check_books(state)


def test_lists_read_nothing_long(state: State, tenant: Tenant) -> None:
    state.sessions.create(tenant, say("a"), context=TOOLS)
    with statements(state) as asked:
        assert len(state.sessions.page(tenant)) == 1
        assert len(state.sessions.recent(100, 9)) == 1
    assert not any("contexts" in statement or "turns" in statement for statement in asked)


def test_who_knows_where_a_named_session_ends_goes_on_from_there_and_nowhere_else(state: State) -> None:
    tenant = state.tenants.create("small", max_sessions=1)
    state.sessions.go_on_named(tenant, "n", say("a", "b"), n_tokens=1, used=USED, head=None)
    with pytest.raises(Conflict):
        state.sessions.go_on_named(tenant, "n", say("x", "y"), n_tokens=1, used=USED, head=None)
    found = state.sessions.open_named(tenant, "n")
    assert found is not None
    session, messages = found
    assert messages == say("a", "b")
    state.sessions.go_on_named(tenant, "n", say("a", "b", "c", "d"), n_tokens=1, used=USED, head=session.head)
    assert state.sessions.messages(tenant, session.session_id) == say("a", "b", "c", "d")
    with pytest.raises(RateLimited):
        name(state, tenant, "m", *say("x"))
    assert state.sessions.open_named(tenant, "m") is None, "what was asked for does not make way for what is only named"


def test_pages_hold_every_session_once(state: State, tenant: Tenant) -> None:
    made = {state.sessions.create(tenant).session_id for _ in range(7)}
    seen: list[str] = []
    while page := state.sessions.page(tenant, limit=3, after=seen[-1] if seen else None):
        seen += [session.session_id for session in page]
    assert sorted(seen) == sorted(made)
    assert state.sessions.count(tenant) == 7


def test_sessions_outlive_the_process(tmp_path: Path) -> None:
    file = str(tmp_path / "deep" / "state.db")
    first = State(file)
    tenant = first.tenants.create("acme")
    made = first.sessions.create(tenant, say("a", "ü"))
    first.close()
    second = State(file)
    assert second.tenants.get("acme") == tenant
    assert second.sessions.messages(tenant, made.session_id) == say("a", "ü")
    second.close()
