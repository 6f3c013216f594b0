"""pasture: one llama.cpp model for a whole team, on one shared KV cache.

    import pasture

    with pasture.open("model.gguf", kv_memory="2GiB") as herd:
        async for text in herd.chat([{"role": "user", "content": "Hello"}]):
            print(text, end="")

`pasture serve` is the same engine behind an OpenAI-compatible API.
"""

from pasture.core.errors import (
    ConfigError,
    DeadlineExceeded,
    DoesNotFit,
    EngineError,
    ModelError,
    PastureError,
    PromptTooLong,
    QueueFull,
    RequestError,
    ShuttingDown,
)
from pasture.core.values import Constraint, ConstraintKind, FinishReason, SamplingParams, Usage
from pasture.herd import GenerateOptions, Herd, OpenOptions, Reply, open

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Constraint",
    "ConstraintKind",
    "DeadlineExceeded",
    "DoesNotFit",
    "EngineError",
    "FinishReason",
    "GenerateOptions",
    "Herd",
    "ModelError",
    "OpenOptions",
    "PastureError",
    "PromptTooLong",
    "QueueFull",
    "Reply",
    "RequestError",
    "SamplingParams",
    "ShuttingDown",
    "Usage",
    "__version__",
    "open",
]
