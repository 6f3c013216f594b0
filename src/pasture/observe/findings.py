"""One thing that is wrong, as a person would tell a colleague. A value; whoever finds it decides nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is stable, for scripts; the rest is for people."""

    name: str
    message: str
    """what is wrong, one sentence"""
    evidence: str
    """what was seen, with numbers or a quotation"""
    advice: str
    """what to change"""
