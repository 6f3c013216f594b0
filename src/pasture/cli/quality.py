"""`pasture bench quality`: what each form of stored KV, and a live cache shifted down, does to a model's answers.

Puts engine and texts together; the measuring is `pasture.engine.quality`'s, the text Python's own help. The table is what
`--kv-quality` is to be chosen by, and what `pasture.stores.DIVERGENCE` is copied from, rounded up. In the calling thread.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random

from rich.table import Table

from pasture.bench.answering import Answer, deliver
from pasture.bench.corpus import passage
from pasture.bench.options import BenchOptions
from pasture.bench.systems import default_model, default_threads
from pasture.cli.output import err, report
from pasture.config import Settings, validate_settings
from pasture.core.errors import ConfigError, PastureError
from pasture.core.values import Form, Weights
from pasture.engine.llama import LlamaEngine
from pasture.engine.quality import RECOMPUTED, FormQuality, measure_quality
from pasture.server import measuring_engine

CONTEXT_TOKENS, HELD_TOKENS = 512, 256
CELLS, SEQUENCES = 2048, 64
"""of the engine; logits are kept for as many tokens as there are sequences"""
WRITTEN_TOKENS = int((CONTEXT_TOKENS + HELD_TOKENS) * 1.3)
"""a passage of so many tokens by the rule of thumb is long enough in other vocabularies too"""


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's answers."""

    weights: Weights
    forms: tuple[FormQuality, ...]


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, whatever came out."""
    try:
        measured = _measure(options)
    except PastureError as error:
        return report(error)
    held = {"context_tokens": CONTEXT_TOKENS, "held_tokens": HELD_TOKENS}
    deliver(Answer(held | asdict(measured), [table(measured)]), options)
    return 0


def model_settings(options: BenchOptions, **more: object) -> Settings:
    """A server's settings for what a benchmark was told about the model and the machine."""
    model, threads = str(options.model or default_model()), options.threads or default_threads()
    return validate_settings({"model": model, "threads": threads, **more})


def table(measured: Measured) -> Table:
    """One row a form; RAW stands for the lossless form too, and another way to compute the same is the yardstick."""
    made = Table(title=f"a token's KV in each form; {measured.forms[0].n_tokens:,} held tokens, weights: {measured.weights}")
    names = {Form.RAW.value: "stored f16, lossless", RECOMPUTED: f"computed in {RECOMPUTED}"}
    for heading in ("form", "bytes", "KL mean", "KL p99", "top-1", "perplexity", "of f16"):
        made.add_column(heading, justify="left" if heading == "form" else "right")
    for form in measured.forms:
        made.add_row(
            names.get(form.name, form.name if form.name.startswith("live") else f"stored {form.name}"),
            f"{form.bytes_per_token:,.0f}",
            f"{form.kl_mean:.2g}",
            f"{form.kl_p99:.2g}",
            f"{form.top1_agreement:.2%}",
            f"{form.perplexity:.3f}",
            f"{form.reference_perplexity:.3f}",
        )
    return made


def _measure(options: BenchOptions) -> Measured:
    with (
        err().status(f"{options.texts} texts of {CONTEXT_TOKENS} + {HELD_TOKENS} tokens"),
        measuring_engine(model_settings(options, weights=options.weights), CELLS, SEQUENCES) as engine,
    ):
        if not isinstance(engine, LlamaEngine):
            raise ConfigError("quality needs a model")
        rng = Random(f"quality-{options.seed}")
        texts = [
            engine.vocabulary.tokenize(passage(rng, WRITTEN_TOKENS), add_special=True, parse_special=False)
            for _ in range(options.texts)
        ]
        forms = measure_quality(engine, texts, context_tokens=CONTEXT_TOKENS, held_tokens=HELD_TOKENS)
        return Measured(engine.model.weights, forms)
