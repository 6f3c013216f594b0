"""What travels between ingresses and replicas: one type a frame, as MessagePack, and checked against the type on arrival.

    to a replica        Generate, Acknowledge, Cancel; Watch, AskSnapshot; Anticipate, Unpin; and the calls: Locate, Export,
                        Restore, Pin, Prefetch, OpenPrefix, Verify, HandOver
    from a replica      Hello; Events, Ended; the answers to calls: Located, Opened, Counted, Done, and Failed; to those who
                        watch: Delta, Snapshot, Homes, Statistics, Pulled

What may be large travels behind its frame as bytes: what was exported, and the keys of blocks. `tokens` are C ints as
they lie in memory. Errors of pasture's own arrive as what they were. Values and their encoding; no I/O.
"""

from __future__ import annotations

from array import array
from typing import Any, TypeVar

import msgspec

from pasture.cluster.members import Identity, Member
from pasture.cluster.values import Epoch, ReplicaId
from pasture.core import errors
from pasture.core.errors import PastureError, QueueFull, RequestError
from pasture.core.statistics import PrefixContent, ServiceStatistics
from pasture.core.values import Allowance, Finish, Namespace, Request, TokenEvent, TokenLogprobs, Usage, Whereabouts

_Frame = TypeVar("_Frame")


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Fields go by their place: both ends are of the same version, which the greeting makes sure of."""


# To a replica


class Source(Frame, frozen=True):
    """Who has the KV of a prompt's beginning, for a replica that should fetch it first."""

    member: Member
    n_tokens: int


class Generate(Frame, frozen=True, tag=True):
    """Answered by `Events` until one has a finish, or by `Failed`."""

    id: int
    request: Request
    session: str | None
    """what the router knows the conversation by"""
    uncached_tokens: int
    """that the router expects the replica to compute"""
    source: Source | None


class Acknowledge(Frame, frozen=True, tag=True):
    """So many more events of a stream were read."""

    id: int
    n_events: int


class Cancel(Frame, frozen=True, tag=True):
    id: int


class Watch(Frame, frozen=True, tag=True):
    """From now on, tell everything that changes."""


class AskSnapshot(Frame, frozen=True, tag=True):
    pass


class Allow(Frame, frozen=True, tag=True):
    namespace: Namespace
    allowance: Allowance


class KeepFor(Frame, frozen=True, tag=True):
    """See `core.ports.Service.keep_for`."""

    seconds: dict[Namespace, float]


class Anticipate(Frame, frozen=True, tag=True):
    namespace: Namespace
    tokens: bytes
    typing: bool


class Unpin(Frame, frozen=True, tag=True):
    pin: int
    """the id of the call that pinned"""


class OfTokens(Frame, frozen=True):
    """A call about the KV of these tokens."""

    id: int
    namespace: Namespace
    tokens: bytes


class Locate(OfTokens, frozen=True, tag=True):
    """Answered by `Located`."""

    deep: bool


class Export(OfTokens, frozen=True, tag=True):
    """Answered by `Done`, and the export behind it."""


class Restore(OfTokens, frozen=True, tag=True):
    """An export is behind it, or nothing. Answered by `Counted`: the tokens that were taken in."""

    session: str | None


class Pin(OfTokens, frozen=True, tag=True):
    """Answered by `Done`; kept until `Unpin`, or until the connection ends."""


class Prefetch(OfTokens, frozen=True, tag=True):
    """Answered by `Done`."""


class OpenPrefix(Frame, frozen=True, tag=True):
    """Answered by `Opened`."""

    id: int
    number: int
    """the replica's own"""
    n_tokens: int


class Verify(Frame, frozen=True, tag=True):
    """Answered by `Counted`: tokens that were compared, those that differ."""

    id: int


class HandOver(Frame, frozen=True, tag=True):
    """Answered by `Counted`: conversations, those carried, their tokens and bytes."""

    id: int
    members: tuple[Member, ...]


Call = Locate | Export | Restore | Pin | Prefetch | OpenPrefix | Verify | HandOver
ToReplica = Generate | Acknowledge | Cancel | Watch | AskSnapshot | Allow | KeepFor | Anticipate | Unpin | Call


# From a replica


class Hello(Frame, frozen=True, tag=True):
    replica: ReplicaId
    epoch: Epoch
    identity: Identity


class Event(Frame, frozen=True):
    """A `TokenEvent` of the stream with this id."""

    id: int
    token: int | None
    logprobs: TokenLogprobs | None
    finish: Finish | None
    usage: Usage | None

    @classmethod
    def of(cls, number: int, event: TokenEvent) -> Event:
        return cls(number, event.token, event.logprobs, event.finish, event.usage)

    @property
    def value(self) -> TokenEvent:
        return TokenEvent(self.token, self.logprobs, self.finish, self.usage)


class Events(Frame, frozen=True, tag=True):
    """What the streams of a connection got in one turn of the replica's loop."""

    events: list[Event]


class Ended(Frame, frozen=True, tag=True):
    """What a traced request had cost that its reader has left, or that fails: sent before the failure."""

    id: int
    usage: Usage


class Located(Frame, frozen=True, tag=True):
    id: int
    found: Whereabouts


class Opened(Frame, frozen=True, tag=True):
    id: int
    content: PrefixContent | None


class Counted(Frame, frozen=True, tag=True):
    id: int
    counts: dict[str, int]


class Done(Frame, frozen=True, tag=True):
    id: int


class Failed(Frame, frozen=True, tag=True):
    id: int
    error: PastureError


class Delta(Frame, frozen=True, tag=True):
    """See `values.Delta`; behind it the keys of the blocks that were stored, then of those that are gone."""

    number: int
    n_stored: int
    uncached_tokens: int


class Snapshot(Frame, frozen=True, tag=True):
    """See `values.Snapshot`; behind it the keys of all blocks."""

    number: int
    uncached_tokens: int


class Homes(Frame, frozen=True, tag=True):
    """Conversations that stand at this replica now."""

    homes: list[tuple[str, str | None]]
    """session, and the key of its last full block in hexadecimal"""


class Statistics(Frame, frozen=True, tag=True):
    """Of the prefixes without their tokens: what people wrote stays on its machine, unless an administrator asks for it."""

    statistics: ServiceStatistics


class Pulled(Frame, frozen=True, tag=True):
    """Something was fetched from a peer."""

    n_bytes: int
    seconds: float


Answer = Located | Opened | Counted | Done | Failed
News = Delta | Snapshot | Homes | Statistics | Pulled
FromReplica = Hello | Events | Ended | Answer | News


class BadFrame(ValueError):
    """Bytes that are no frame of those that can come this way."""


def encode(frame: Frame) -> bytes:
    return _encoder.encode(frame)


def to_replica(data: bytes) -> ToReplica:
    """Raises BadFrame."""
    return _decoded(_to_replica, data)


def from_replica(data: bytes) -> FromReplica:
    """Raises BadFrame."""
    return _decoded(_from_replica, data)


def _decoded(decoder: msgspec.msgpack.Decoder[_Frame], data: bytes) -> _Frame:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadFrame(str(error)) from error


def unpack_tokens(data: bytes) -> array[int]:
    """Raises BadFrame."""
    tokens = array("i")
    try:
        tokens.frombytes(data)
    except ValueError as error:
        raise BadFrame(str(error)) from error
    return tokens


def _plain(value: object) -> object:
    """What msgspec does not know by itself. Raises NotImplementedError for what has no business in a frame."""
    if isinstance(value, PastureError):
        param = value.param if isinstance(value, RequestError) else None
        seconds = value.retry_after_seconds if isinstance(value, QueueFull) else None
        return type(value).__name__, str(value), param, seconds
    raise NotImplementedError(f"{type(value).__name__} cannot travel")


def _unplain(kind: type, plain: Any) -> object:
    """Raises ValueError for what is no error of pasture's."""
    if kind is not PastureError:
        raise NotImplementedError(f"{kind.__name__} cannot travel")
    name, message, param, seconds = plain
    made = getattr(errors, name, None)
    if not (isinstance(made, type) and issubclass(made, PastureError)):
        raise ValueError(f"{name!r} is no error of pasture's")
    if issubclass(made, QueueFull):
        error: PastureError = made(message, retry_after_seconds=float(seconds))
    else:
        error = made(message)
    if isinstance(error, RequestError):
        error.param = param
    return error


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica, dec_hook=_unplain)
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica, dec_hook=_unplain)
