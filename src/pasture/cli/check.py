"""`pasture check MODEL`: what a model costs here, before anybody depends on it.

Bytes a token come from the file's header; how many conversations fit, from the machine's free memory; prefill and decode
rates are measured in seconds on the loaded model, through the same engine that serves. Nothing is written and nothing
listens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pasture.cli.flags import with_settings
from pasture.cli.output import err, out, print_json, remarks, set_up_logging, weights
from pasture.config import Configuration, format_bytes, format_seconds, setting_specs
from pasture.core.values import ModelInfo
from pasture.engine.rates import DECODE_SEQUENCES, N_MEASURES, Rates, measure

CONVERSATION_TOKENS = (1024, 4096, 8192, 32768)
MEASURING_CELLS = 4096

_RELEVANT_GROUPS = {"Model", "Shared KV cache", "Speed"}
_IRRELEVANT = {"model", "alias", "chat_template", "chat_template_file", "share_prefix", "kv_layout"}
_LEFT_OUT = _IRRELEVANT | {spec.name for spec in setting_specs().values() if spec.flag.group not in _RELEVANT_GROUPS}


@with_settings(without=_LEFT_OUT)
def check(
    configuration: Configuration,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The GGUF file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What fits on this machine with a model, and how fast it is.

    pasture check model.gguf
    pasture check model.gguf -ctk q8_0 -ctv q8_0 --kv-memory 4GiB
    """
    from pasture.engine.memory import available_bytes
    from pasture.server import measuring_engine, planned_cells, probe  # loads libllama: not before it is needed

    settings = configuration.settings.model_copy(update={"model": model})
    set_up_logging("warning")
    free = available_bytes()
    info = probe(settings)
    n_cells = planned_cells(settings)
    with remarks() as found, _progress() as progress:
        task = progress.add_task("Loading", total=N_MEASURES + 1)

        def on_progress(label: str) -> None:
            progress.update(task, advance=1, description=label)

        with measuring_engine(settings, min(n_cells, MEASURING_CELLS), max(DECODE_SEQUENCES)) as engine:
            rates = measure(engine, on_progress)
            names = ("weights", "weights_because", "loaded_path")
            info = replace(info, **{name: getattr(engine.model, name) for name in names})
        progress.update(task, completed=N_MEASURES + 1)
    answer = Answer(info, free, n_cells, rates, tuple(found))
    if as_json:
        print_json(answer.as_json())
    else:
        answer.print()


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything `check` found out."""

    model: ModelInfo
    free_bytes: int
    n_cells: int
    rates: Rates
    slowed_by: tuple[str, ...]
    """what the self-check turned off or found slow, each with its reason"""

    def users(self, n_tokens: int, shared_tokens: int) -> int:
        """Conversations of `n_tokens` that fit at once when they have their first `shared_tokens` in common."""
        own = n_tokens - shared_tokens
        return max(0, (self.n_cells - shared_tokens) // own)

    def as_json(self) -> dict[str, object]:
        return {
            "model": {
                "name": self.model.name,
                "architecture": self.model.architecture,
                "description": self.model.description,
                "parameters": self.model.n_params,
                "bytes": self.model.n_bytes,
                "context_length": self.model.n_ctx_train,
                "shareable": self.model.shareable,
                "weights": self.model.weights,
                "loaded_path": self.model.loaded_path,
                "weights_because": self.model.weights_because,
            },
            "free_bytes": self.free_bytes,
            "cell_bytes": self.model.cell_bytes,
            "cells": self.n_cells,
            "conversations": [
                {"tokens": n, "nothing_shared": self.users(n, 0), "half_shared": self.users(n, n // 2)}
                for n in CONVERSATION_TOKENS
            ],
            "prefill_tokens_per_second": round(self.rates.prefill_tokens_per_second, 1),
            "decode": [
                {
                    "sequences": rate.sequences,
                    "tokens_per_second": round(rate.tokens_per_second, 1),
                    "step_seconds": round(rate.step_seconds, 5),
                }
                for rate in self.rates.decode
            ],
            "self_check": list(self.slowed_by),
        }

    def print(self) -> None:
        console = out()
        model = self.model
        facts = Table.grid(padding=(0, 2))
        facts.add_row("model", f"{model.name}, {model.description}, {format_bytes(model.n_bytes)}")
        facts.add_row("weights", weights(model))
        facts.add_row("trained for", f"{model.n_ctx_train:,} tokens")
        facts.add_row("a token's KV", format_bytes(model.cell_bytes) if model.cell_bytes else "none: this model keeps a state")
        facts.add_row("free memory", format_bytes(self.free_bytes))
        facts.add_row("pool", f"{self.n_cells:,} tokens, {format_bytes(self.n_cells * model.cell_bytes)}")
        facts.add_row("sharing", "any common beginning" if model.shareable else "whole conversations only")
        facts.add_row("prefill", _rate(self.rates.prefill_tokens_per_second))
        for rate in self.rates.decode:
            step = format_seconds(rate.step_seconds)
            facts.add_row(f"decode, {rate.sequences} at once", f"{_rate(rate.tokens_per_second)} ({step} a step)")
        facts.add_row("self-check", "\n".join(map(escape, self.slowed_by)) or "nothing slows it down")
        console.print(facts, highlight=False)
        table = Table(title="Conversations that fit at once", title_justify="left")
        for heading in ("tokens each", "nothing in common", "half in common"):
            table.add_column(heading, justify="right")
        for n_tokens in CONVERSATION_TOKENS:
            table.add_row(f"{n_tokens:,}", f"{self.users(n_tokens, 0):,}", f"{self.users(n_tokens, n_tokens // 2):,}")
        console.print(table)


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second >= 10 else f"{tokens_per_second:.1f} tokens/s"


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err(), transient=True)
