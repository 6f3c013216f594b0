"""What a lift should read, and from where: the questions to slow tiers before the first byte is read.

    divisible      block after block behind what is there, each from the first tier that has it, and a short block at the end
    indivisible    the longest checkpoint of any tier that is longer than what is there

Pure but for the tiers it asks; background threads. What a tier says is not believed: addresses are computed here or checked.
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


@dataclass(frozen=True, slots=True)
class Reading:
    """One block to be read."""

    tier: SlowTier
    address: Address
    tokens: array[int]
    whole: bool


def plan(memory: MemoryTier, tiers: Sequence[SlowTier], gate: Gate, trail: Trail, have: int) -> list[Reading]:
    """The blocks behind `trail.tokens[:have]` that are worth reading, in order; never more than the RAM budget holds."""
    if not memory.divisible:
        return _longest_checkpoint(tiers, gate, trail, have)
    readings, p1 = _following_blocks(memory, tiers, trail, have)
    room = memory.budget_bytes - memory.pinned_bytes
    affordable = max(0, room // max(1, gate.stored_bytes(BLOCK_TOKENS)))
    if len(readings) > affordable:
        readings = readings[:affordable]
        p1 = readings[-1].address.p1 if readings else have
    while readings and not gate.fetch_slow(readings[-1].tier.name, p1 - max(have, _start_of_last_run(readings))):
        first = _first_of_last_run(readings)
        p1, readings = readings[first].address.p0, readings[:first]
    return readings


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
    path = [trail[index] for index in range(have // BLOCK_TOKENS, trail.n_blocks)]
    readings: list[Reading] = []
    done = 0
    while done < len(path):
        if path[done].key in memory:
            done += 1
            continue
        tier, n_there = _first_with(tiers, path[done:])
        if tier is None:
            break
        absent = [address for address in path[done : done + n_there] if address.key not in memory]
        readings += [Reading(tier, a, trail.tokens[a.p0 : a.p1], whole=False) for a in absent]
        done += n_there
    if done == len(path):
        return readings, len(trail)
    p0 = path[done].p0
    best, agreeing = _best_end(tiers, trail, p0 // BLOCK_TOKENS)
    if best is not None and p0 + agreeing > max(have, memory.reach(trail)):
        return [*readings, best], p0 + agreeing
    return readings, p0


def _first_with(tiers: Sequence[SlowTier], path: Sequence[Address]) -> tuple[SlowTier | None, int]:
    for tier in tiers:
        n_there = tier.leading(path)
        if n_there:
            return tier, n_there
    return None, 0


def _behind(tier: SlowTier, trail: Trail, index: int) -> Iterator[tuple[Address, array[int]]]:
    """What the tier lists behind the parent of block `index`, where that can be true."""
    parent, p0 = trail[index].parent, index * BLOCK_TOKENS
    for address, tokens in tier.following(parent):
        if 0 < len(tokens) <= BLOCK_TOKENS and address == Address(child_key(parent, tokens), parent, p0, p0 + len(tokens)):
            yield address, tokens


def _best_end(tiers: Sequence[SlowTier], trail: Trail, index: int) -> tuple[Reading | None, int]:
    """The block that agrees with the trail for longest where no full block of it is stored."""
    part = trail.part(index)
    best, agreeing = None, 0
    for tier in tiers:
        for address, tokens in _behind(tier, trail, index):
            n_common = common_prefix(tokens, part)
            if n_common > agreeing:
                best, agreeing = Reading(tier, address, tokens, whole=False), n_common
    return best, agreeing


def _longest_checkpoint(tiers: Sequence[SlowTier], gate: Gate, trail: Trail, have: int) -> list[Reading]:
    for index in reversed(range(have // BLOCK_TOKENS, trail.n_blocks)):
        part = trail.part(index)
        best: Reading | None = None
        for tier in tiers:
            if tier.leading([trail[index]]):
                best = Reading(tier, trail[index], part, whole=True)
                break
            for address, tokens in _behind(tier, trail, index):
                if tokens == part[: len(tokens)] and (best is None or address.p1 > best.address.p1):
                    best = Reading(tier, address, tokens, whole=True)
        if best is not None and best.address.p1 > have:
            return [best] if gate.fetch_slow(best.tier.name, best.address.p1) else []
    return []
