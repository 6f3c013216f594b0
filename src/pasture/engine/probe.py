"""What a model file costs, before it is loaded.

`probe_model` turns a GGUF header into the same `ModelInfo` the loaded engine reports: `--kv-memory 2GiB` becomes a number
of cells through `cell_bytes`, and `pasture check` prints the rest. The formula for a token's KV is llama.cpp's: for each
layer with attention, one row of K and one of V of `head_count_kv * head_length` elements, at the cache's types. The engine
measures the same number on a real state blob once the model is loaded, and that one wins.
"""

from __future__ import annotations

from pathlib import Path

from pasture.core.errors import ConfigError, ModelError
from pasture.core.values import ModelInfo
from pasture.engine.gguf_header import GgufHeader, model_files, read_header

_BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "iq4_nl": (32, 18),
}
"""type -> (elements, bytes) of one block of it"""

_STATEFUL_KEYS = ("ssm.state_size", "ssm.inner_size", "wkv.head_size", "wkv.head_count", "shortconv.l_cache")
"""metadata that only recurrent and hybrid architectures carry"""


def row_bytes(elements: int, kv_type: str) -> int:
    """Bytes of one row of K or V."""
    if kv_type not in _BLOCKS:
        raise ConfigError(f"there is no KV type {kv_type!r}; choose one of {', '.join(_BLOCKS)}")
    block, size = _BLOCKS[kv_type]
    return -(-elements // block) * size


def probe_model(path: str | Path, *, type_k: str = "f16", type_v: str = "f16") -> ModelInfo:
    """The facts of a model file, read from its header alone. Raises ModelError for a file that is none."""
    header = read_header(path)
    if not header.architecture:
        raise ModelError(f"{path} names no architecture: it holds no language model")
    parts = [read_header(part) for part in model_files(Path(path))]
    return ModelInfo(
        name=header.text("general.name") or header.path.stem,
        path=str(path),
        architecture=header.architecture,
        description=_description(header),
        n_params=sum(part.n_params for part in parts),
        n_bytes=sum(part.file_bytes for part in parts),
        n_vocab=header.array_lengths.get("tokenizer.ggml.tokens", header.number("vocab_size")),
        n_layers=header.number("block_count"),
        n_ctx_train=header.number("context_length"),
        cell_bytes=cell_bytes(header, type_k=type_k, type_v=type_v),
        shareable=not is_stateful(header),
    )


def head_elements(path: str | Path) -> int:
    """Numbers in one attention head's row of V; 0 for a model without attention."""
    header = read_header(path)
    n_heads = header.number("attention.head_count")
    return header.number("attention.value_length", header.number("embedding_length") // n_heads) if n_heads else 0


def is_stateful(header: GgufHeader) -> bool:
    """Whether some layer keeps a running state in place of a cell a token."""
    return any(f"{header.architecture}.{key}" in header.metadata for key in _STATEFUL_KEYS)


def cell_bytes(header: GgufHeader, *, type_k: str, type_v: str) -> int:
    """Bytes of KV a token, over all layers."""
    n_layers = header.number("block_count") - header.number("nextn_predict_layers")
    n_heads = header.number("attention.head_count")
    if not n_layers or not n_heads:
        return 0
    if not 0 < n_layers <= len(header.tensor_names):
        raise ModelError(f"{header.path} is damaged: it claims {n_layers} layers and has {len(header.tensor_names)} tensors")
    default_length = header.number("embedding_length") // n_heads
    length_k = header.number("attention.key_length", default_length)
    length_v = header.number("attention.value_length", default_length)
    swa_k = header.number("attention.key_length_swa", length_k)
    swa_v = header.number("attention.value_length_swa", length_v)
    windowed = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    heads = header.numbers("attention.head_count_kv", n_layers, n_heads)
    latent = header.number("attention.kv_lora_rank")
    if latent and header.number("attention.key_length_mla"):
        return n_layers * row_bytes(latent + header.number("rope.dimension_count"), type_k)
    total = 0
    for layer in range(n_layers - header.number("attention.shared_kv_layers")):
        if not _has_attention(header, layer):
            continue
        is_swa = isinstance(windowed, tuple) and bool(windowed[layer % len(windowed)])
        total += row_bytes(heads[layer] * (swa_k if is_swa else length_k), type_k)
        total += row_bytes(heads[layer] * (swa_v if is_swa else length_v), type_v)
    return total


def _has_attention(header: GgufHeader, layer: int) -> bool:
    names = header.tensor_names
    prefix = f"blk.{layer}."
    return any(prefix + name + ".weight" in names for name in ("attn_k", "attn_qkv", "attn_kv_a_mqa", "attn_kv_b"))


def _description(header: GgufHeader) -> str:
    size = header.text("general.size_label") or f"{header.n_params / 1e6:.0f}M"
    return f"{header.architecture} {size}"
