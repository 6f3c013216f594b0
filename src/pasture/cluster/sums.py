"""The statistics of several replicas as those of one service.

Numbers add up, shares are means, latencies are the worst; tables are merged by their keys, rows by their names. Sequences keep
apart because each replica's ids follow on the ids of the one before, prefixes as `forest` says. Goes by the fields of the
values, so whatever they come to hold is summed as well. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar, get_origin, get_type_hints

from pasture.cluster.forest import forest, number_of
from pasture.cluster.values import ReplicaId
from pasture.core.statistics import PoolStatistics, SequenceStatistics, ServiceStatistics
from pasture.core.values import ModelInfo, SeqId

_MEANS = {"fragmentation"}
_WORST = {"latency_seconds", "uptime_seconds"}
_NAMES = ("name", "namespace")
"""by which rows of a table are the same row"""

_T = TypeVar("_T")


def as_loaded(model: ModelInfo, loaded: Sequence[ModelInfo]) -> ModelInfo:
    """What the file says of a model, with what replicas say of how they have loaded it: the first one's, where they differ."""
    if not loaded:
        return model
    reasons = dict.fromkeys(reason for one in loaded for reason in one.slowed_by)
    first = loaded[0]
    because = [first.weights_because] if first.weights_because else []
    differ = ["not every replica computes with the same"] if len({one.weights for one in loaded}) > 1 else []
    return replace(
        model,
        slowed_by=tuple(reasons),
        weights=first.weights,
        loaded_path=first.loaded_path,
        weights_because="; ".join(because + differ),
    )


def total(
    model: ModelInfo, statistics: Mapping[ReplicaId, ServiceStatistics], marked: Mapping[ReplicaId, int], *, draining: bool
) -> ServiceStatistics:
    """All of them together; of nobody, zeros. `marked`: see `forest.marks`."""
    numbered, first = [], 0
    for replica, one in statistics.items():
        pool = replace(one.pool, sequences=_sequences(one.pool, first, marked[replica]), prefixes=())
        first += one.pool.shape.n_seqs
        numbered.append(replace(one, pool=pool))
    found = _sum(numbered) if numbered else _nothing(ServiceStatistics)
    prefixes = forest({replica: one.pool for replica, one in statistics.items()}, marked)
    return replace(found, model=model, pool=replace(found.pool, prefixes=prefixes), draining=draining)


def _sequences(pool: PoolStatistics, first: int, mark: int) -> tuple[SequenceStatistics, ...]:
    return tuple(
        replace(
            row,
            sequence=SeqId(row.sequence + first),
            prefix=None if row.prefix is None else number_of(row.prefix, mark),
        )
        for row in pool.sequences
    )


def _sum(values: Sequence[_T]) -> _T:
    """Of equal dataclasses."""
    first: Any = values[0]
    summed = {field.name: _field(field.name, [getattr(value, field.name) for value in values]) for field in fields(first)}
    found: _T = type(first)(**summed)
    return found


def _field(name: str, values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known or isinstance(known[0], bool | str | Enum):
        return known[0] if known else None
    if isinstance(known[0], int | float):
        if name in _MEANS:
            return sum(known) / len(known)
        return max(known) if name in _WORST else sum(known)
    if isinstance(known[0], Mapping):
        keys = dict.fromkeys(key for table in known for key in table)
        return {key: _field(name, [table[key] for table in known if key in table]) for key in keys}
    if is_dataclass(known[0]):
        return _sum(known)
    return _rows([row for table in known for row in table])


def _rows(rows: Sequence[Any]) -> tuple[Any, ...]:
    naming = next((name for name in _NAMES if rows and hasattr(rows[0], name)), None)
    if naming is None or isinstance(rows[0], SequenceStatistics):
        return tuple(rows)
    named: dict[object, list[Any]] = {}
    for row in rows:
        named.setdefault(getattr(row, naming), []).append(row)
    return tuple(_sum(same) for same in named.values())


def _nothing(kind: Any) -> Any:
    """A value of that type that says nothing."""
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind, localns={"array": list})
        return kind(**{field.name: _nothing(hints[field.name]) for field in fields(kind)})
    origin = get_origin(kind) or kind
    if isinstance(origin, type):
        if issubclass(origin, Enum):
            return next(iter(origin))
        if issubclass(origin, bool | int | float | str):
            return origin()
        if issubclass(origin, Mapping):
            return {}
        if issubclass(origin, Sequence):
            return ()
    return None
