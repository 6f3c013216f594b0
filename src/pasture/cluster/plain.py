"""Values as JSON and back: how requests, events, statistics and errors travel between the machines of a cluster.

A value is written by its fields and read by its type's annotations, so what arrives is checked as far as types go, and nothing
but the classes named in them is ever made: no pickle crosses the network. Mappings travel as pairs because JSON knows only
strings as keys; numbers that JSON does not know (infinity) travel as words. Pure; any thread.
"""

from __future__ import annotations

import math
import types
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Generic, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pasture.core import errors
from pasture.core.errors import PastureError, QueueFull, RequestError

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""what JSON can say"""

_T = TypeVar("_T")


class _Array(Generic[_T]):
    """Stands for `array` in annotations, which Python 3.11 cannot evaluate with an argument."""


_Read = Callable[[Any], Any]


def to_plain(value: object) -> Plain:
    """Raises TypeError for what has no plain form."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, PastureError):
        return _error_to_plain(value)
    if is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name in _names(cast(Any, type(value)))}
    if isinstance(value, Mapping):
        return [[to_plain(key), to_plain(entry)] for key, entry in value.items()]
    if isinstance(value, array):
        return value.tolist()
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [to_plain(entry) for entry in value]
    raise TypeError(f"{type(value).__name__} has no plain form")


def from_plain(kind: type[_T], plain: Plain) -> _T:
    """The value of that type. Raises ValueError for anything that is none."""
    try:
        return cast(_T, _reader(cast(Any, kind))(plain))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"this is no {getattr(kind, '__name__', kind)}: {error}") from error


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@cache
def _reader(kind: Any) -> _Read:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional(kind)
    if origin is not None:
        return _container(origin, get_args(kind))
    if isinstance(kind, NewType):
        return _reader(kind.__supertype__)
    if not isinstance(kind, type):
        raise TypeError(f"{kind} cannot be read")
    if issubclass(kind, PastureError):
        return _error_from_plain
    if is_dataclass(kind):
        return _dataclass(kind)
    if issubclass(kind, Enum):
        return kind
    if kind is float:
        return float
    return _exactly(kind)


def _exactly(kind: type) -> _Read:
    def read(plain: Any) -> Any:
        if not isinstance(plain, kind):
            raise TypeError(f"{type(plain).__name__} instead of {kind.__name__}")
        return plain

    return read


def _optional(kind: Any) -> _Read:
    wanted = [option for option in get_args(kind) if option is not type(None)]
    if len(wanted) != 1:
        raise TypeError(f"{kind} cannot be told apart in JSON")
    inner = _reader(wanted[0])
    return lambda plain: None if plain is None else inner(plain)


def _container(origin: Any, arguments: tuple[Any, ...]) -> _Read:
    if origin is _Array:
        return lambda plain: array("i", plain)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, entry = (_reader(argument) for argument in arguments)
        return lambda plain: {key(name): entry(value) for name, value in plain}
    if origin is tuple and arguments[-1] is not Ellipsis:
        parts = [_reader(argument) for argument in arguments]
        return lambda plain: tuple(part(value) for part, value in zip(parts, plain, strict=True))
    inner = _reader(arguments[0])
    make = frozenset if origin is frozenset else tuple
    return lambda plain: make(map(inner, plain))


def _dataclass(kind: type) -> _Read:
    hints = get_type_hints(kind, localns={"array": _Array})
    readers: dict[str, _Read] = {}

    def read(plain: Any) -> Any:
        if not readers:  # late, because types may hold each other
            readers.update({name: _reader(hints[name]) for name in _names(kind)})
        return kind(**{name: readers[name](value) for name, value in plain.items()})

    return read


def _error_to_plain(error: PastureError) -> Plain:
    plain: dict[str, Plain] = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, RequestError):
        plain["param"] = error.param
    if isinstance(error, QueueFull):
        plain["retry_after_seconds"] = error.retry_after_seconds
    return plain


def _error_from_plain(plain: Any) -> PastureError:
    kind = getattr(errors, plain["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, PastureError)):
        raise ValueError(f"{plain['kind']!r} is no error of pasture's")
    message = str(plain["message"])
    if issubclass(kind, QueueFull):
        full = kind(message, retry_after_seconds=float(plain["retry_after_seconds"]))
        full.param = plain.get("param")
        return full
    if issubclass(kind, RequestError):
        return kind(message, param=plain.get("param"))
    return kind(message)
