"""What a lift should read, and from where: the questions to slow tiers before the first byte is read.

    divisible      block after block behind what is there, each from the first tier that has it, and a short block at the end
    indivisible    the longest checkpoint of any tier that is longer than what is there

A tier is asked about the whole path at once, and only where faster ones lack something of it. Pure but for the tiers it asks;
background threads. What a tier says is not believed: addresses are computed here or checked.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pasture.core.storage import BLOCK_TOKENS
from pasture.tiers.gate import Gate
from pasture.tiers.keys import Address, child_key
from pasture.tiers.memory import MemoryTier
from pasture.tiers.ports import SlowTier
from pasture.tiers.trail import Trail, common_prefix

ASKED_TOGETHER = 16
"""places that are searched for a checkpoint in one question, the last first"""


@dataclass(frozen=True, slots=True)
class Reading:
    """One block to be read."""

    tier: SlowTier
    source: int
    """the tier's number, fastest first"""
    address: Address
    tokens: array[int]
    whole: bool

    @property
    def n_tokens(self) -> int:
        """Tokens whose KV will be in RAM with it."""
        return self.address.p1 if self.whole else len(self.tokens)


def plan(memory: MemoryTier, tiers: Sequence[SlowTier], gate: Gate, trail: Trail, have: int) -> list[Reading]:
    """The blocks behind `trail.tokens[:have]` that are worth reading, in order; never more than the RAM budget holds."""
    if not memory.divisible:
        return _longest_checkpoint(tiers, gate, trail, have)
    readings, p1 = _following_blocks(memory, tiers, trail, have)
    affordable = within_room(memory, gate, readings)
    if len(affordable) < len(readings):
        readings = affordable
        p1 = readings[-1].address.p1 if readings else have
    while readings and not gate.fetch_slow(readings[-1].tier.name, p1 - max(have, _start_of_last_run(readings))):
        first = _first_of_last_run(readings)
        p1, readings = readings[first].address.p0, readings[:first]
    return readings


def within_room(memory: MemoryTier, gate: Gate, readings: Sequence[Reading], coming_tokens: int = 0) -> list[Reading]:
    """So many of them, from the first, as RAM can pin beside what it pins already and what others are bringing.

    A checkpoint, whose size nobody knows beforehand, may begin as long as there is any room.
    """
    room = memory.budget_bytes - memory.pinned_bytes - gate.stored_bytes(coming_tokens)
    if readings and readings[0].whole:
        return list(readings[: int(room > 0)])
    return list(readings[: max(0, room // max(1, gate.stored_bytes(BLOCK_TOKENS)))])


def leading_tokens(tier: SlowTier, trail: Trail, *, divisible: bool) -> int:
    """How many tokens from its beginning the tier has of a path; the blocks of a model that cannot be cut are whole states.

    Nobody uses them for being counted.
    """
    found = tier.stored([trail[index] for index in range(trail.n_blocks)], use=False)
    if divisible:
        first_missing = next((index for index, there in enumerate(found) if not there), trail.n_blocks)
    else:
        first_missing = 1 + max((index for index, there in enumerate(found) if there), default=-1)
    if first_missing == trail.n_blocks:
        return len(trail)
    part = trail.part(first_missing)
    behind = _behind(tier, trail, [first_missing])[0]
    if divisible:
        agreeing = max((common_prefix(tokens, part) for _, tokens in behind), default=0)
    else:
        agreeing = max((len(tokens) for _, tokens in behind if tokens == part[: len(tokens)]), default=0)
    return first_missing * BLOCK_TOKENS + agreeing


def _first_of_last_run(readings: Sequence[Reading]) -> int:
    """Where the neighbours begin that come from the same tier as the last."""
    first = len(readings) - 1
    while first and readings[first - 1].tier is readings[-1].tier:
        first -= 1
    return first


def _start_of_last_run(readings: Sequence[Reading]) -> int:
    return readings[_first_of_last_run(readings)].address.p0


def _following_blocks(memory: MemoryTier, tiers: Sequence[SlowTier], trail: Trail, have: int) -> tuple[list[Reading], int]:
    """What leads from `have` as far as blocks go, whether RAM has it already (then it is not read) or a tier; and how far."""
    path = [trail[index] for index in range(trail.n_blocks)]
    answers: dict[int, Sequence[bool]] = {}
    asked_from = have // BLOCK_TOKENS

    def has(source: int, index: int) -> bool:
        if source not in answers:
            before, wanted = path[:index], path[index:]
            answers[source] = [*(False for _ in before), *tiers[source].stored(wanted, before)]
        return answers[source][index]

    readings: list[Reading] = []
    for index in range(asked_from, len(path)):
        if path[index].key in memory:
            continue
        source = next((source for source in range(len(tiers)) if has(source, index)), None)
        if source is None:
            p0 = path[index].p0
            best, agreeing = _best_end(tiers, trail, index)
            if best is not None and p0 + agreeing > max(have, memory.reach(trail)):
                return [*readings, best], p0 + agreeing
            return readings, p0
        readings.append(Reading(tiers[source], source, path[index], trail.part(index), whole=False))
    return readings, len(trail)


def _best_end(tiers: Sequence[SlowTier], trail: Trail, index: int) -> tuple[Reading | None, int]:
    """The block that agrees with the trail for longest where no full block of it is stored."""
    part = trail.part(index)
    best, agreeing = None, 0
    for source, tier in enumerate(tiers):
        for address, tokens in _behind(tier, trail, [index])[0]:
            n_common = common_prefix(tokens, part)
            if n_common > agreeing:
                best, agreeing = Reading(tier, source, address, tokens, whole=False), n_common
    return best, agreeing


def _behind(tier: SlowTier, trail: Trail, indexes: Sequence[int]) -> list[list[tuple[Address, array[int]]]]:
    """What the tier lists behind the parent of each of these blocks, where that can be true."""
    listed = tier.following([trail[index].parent for index in indexes])
    return [list(_credible(found, trail, index)) for found, index in zip(listed, indexes, strict=True)]


def _credible(found: Sequence[tuple[Address, array[int]]], trail: Trail, index: int) -> Iterator[tuple[Address, array[int]]]:
    parent, p0 = trail[index].parent, index * BLOCK_TOKENS
    for address, tokens in found:
        if 0 < len(tokens) <= BLOCK_TOKENS and address == Address(child_key(parent, tokens), parent, p0, p0 + len(tokens)):
            yield address, tokens


def _longest_checkpoint(tiers: Sequence[SlowTier], gate: Gate, trail: Trail, have: int) -> list[Reading]:
    for end in range(trail.n_blocks, have // BLOCK_TOKENS, -ASKED_TOGETHER):
        indexes = range(max(have // BLOCK_TOKENS, end - ASKED_TOGETHER), end)
        found = [reading for source in range(len(tiers)) for reading in _checkpoints(tiers, source, trail, indexes)]
        best = max(found, key=lambda reading: (reading.address.p1, -reading.source), default=None)
        if best is not None and best.address.p1 > have:
            return [best] if gate.fetch_slow(best.tier.name, best.address.p1) else []
    return []


def _checkpoints(tiers: Sequence[SlowTier], source: int, trail: Trail, indexes: Sequence[int]) -> Iterator[Reading]:
    """All checkpoints of the trail that the tier has in these places."""
    tier = tiers[source]
    places = [trail[index] for index in indexes]
    for index, address, is_there in zip(indexes, places, tier.stored(places), strict=True):
        if is_there:
            yield Reading(tier, source, address, trail.part(index), whole=True)
    for index, found in zip(indexes, _behind(tier, trail, indexes), strict=True):
        part = trail.part(index)
        for address, tokens in found:
            if tokens == part[: len(tokens)]:
                yield Reading(tier, source, address, tokens, whole=True)
