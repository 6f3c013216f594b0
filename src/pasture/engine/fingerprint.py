"""What must be equal for stored KV to be right: the root of every block key.

In it: the model file's content, the architecture, the KV types as configured, flash attention, whether quantised rows are
rotated, which rope factors are in use, full-size sliding windows, the library's version and the block format's. Not in it: the
number of cells and sequences, the layout, threads, batch sizes, where layers run, and whether weights were written out.
KV from a GPU differs from a CPU's by less than two chunkings of one prompt on the same CPU do, and so does KV from f16 weights:
machines of all kinds may exchange blocks.

A file is hashed whole up to 128 MiB; of a larger one, its beginning (the metadata) and 16 KiB at each of 4,096 places, so
that two fine-tunes of one base differ. Models in several files count all of them. Pure functions; reading takes up to a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from hashlib import blake2b, sha256
from pathlib import Path

from pasture.engine import bindings
from pasture.engine.gguf_header import model_files
from pasture.engine.settings import EngineSettings

BLOCK_FORMAT = 1
"""raise it when a payload's meaning changes"""
_WHOLE_BYTES = 128 << 20
_BEGINNING_BYTES = 8 << 20
_SAMPLE_BYTES = 16 << 10
_N_SAMPLES = 4096
_READ_BYTES = 1 << 20


def kv_fingerprint(settings: EngineSettings, *, architecture: str, long_rope: bool) -> bytes:
    """32 bytes. `long_rope`: the model has two sets of rope factors and uses the one for long contexts."""
    quantised = settings.type_k not in _PLAIN or settings.type_v not in _PLAIN
    facts = (
        f"format {BLOCK_FORMAT}",
        f"library {bindings.VERSION}",
        f"architecture {architecture}",
        f"types {settings.type_k} {settings.type_v}",
        f"flash attention {settings.flash_attn}",
        f"rotated {quantised and not is_rotation_off()}",
        f"long rope {long_rope}",
        "full windows",
    )
    digest = blake2b(digest_size=32)
    for fact in facts:
        digest.update(fact.encode() + b"\n")
    for path in model_files(Path(settings.model_path)):
        digest.update(content_id(path))
    return digest.digest()


_PLAIN = ("f32", "f16", "bf16")


def is_rotation_off() -> bool:
    """Whether the library was told not to rotate quantised K and V; it reads the variable as C's atoi does."""
    number = re.match(r"\s*[+-]?\d+", os.environ.get(bindings.ROTATION_SWITCH, ""))
    return number is not None and int(number.group()) != 0


def content_id(path: Path) -> bytes:
    """32 bytes that change with the file's size or content."""
    size = path.stat().st_size
    digest = sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for start, count in _places(size):
            file.seek(start)
            digest.update(file.read(count))
    return digest.digest()


def _places(size: int) -> Iterator[tuple[int, int]]:
    whole = size if size <= _WHOLE_BYTES else _BEGINNING_BYTES
    for start in range(0, whole, _READ_BYTES):
        yield start, min(_READ_BYTES, whole - start)
    if whole < size:
        step = (size - whole - _SAMPLE_BYTES) / (_N_SAMPLES - 1)
        for index in range(_N_SAMPLES):
            yield whole + int(index * step), _SAMPLE_BYTES
