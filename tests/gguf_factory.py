"""Tiny random models as GGUF files: valid for llama.cpp, a few hundred kilobytes, and without any sense.

`write_llama`, `write_gemma3` (sliding windows), `write_mamba` and `write_falcon_h1` (a hybrid of attention and state) share
one byte-level vocabulary of 300 tokens. Weights are seeded, so a file is the same on every run.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 300
N_EMBD = 64
N_LAYERS = 2
N_CTX = 512
_RANDOM_SEED = 7


def write_llama(path: Path, *, n_heads: int = 4, n_kv_heads: int = 2, n_ff: int = 96, quantised: bool = False) -> Path:
    """Plain attention: every prefix can be shared. `quantised`: matrices as q8_0."""
    writer = _writer(path, "llama")
    _attention_metadata(writer, n_heads, n_kv_heads, n_ff)
    tensors = _Tensors(writer, quantised=quantised)
    tensors.outer()
    for layer in range(N_LAYERS):
        tensors.norm(f"blk.{layer}.attn_norm.weight", N_EMBD)
        tensors.attention(layer, n_heads, n_kv_heads)
        tensors.norm(f"blk.{layer}.ffn_norm.weight", N_EMBD)
        tensors.feed_forward(layer, n_ff)
    return _finish(writer, path)


def write_gemma3(path: Path, *, window_tokens: int = 16) -> Path:
    """Five layers of sliding-window attention, one of full attention."""
    n_heads, n_kv_heads, n_ff, n_layers = 4, 2, 96, 6
    head = N_EMBD // n_heads
    writer = _writer(path, "gemma3", n_layers=n_layers)
    _attention_metadata(writer, n_heads, n_kv_heads, n_ff)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_sliding_window(window_tokens)
    tensors = _Tensors(writer)
    tensors.outer()
    for layer in range(n_layers):
        prefix = f"blk.{layer}."
        tensors.attention(layer, n_heads, n_kv_heads)
        tensors.feed_forward(layer, n_ff)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensors.norm(prefix + name + ".weight", N_EMBD)
        tensors.norm(prefix + "attn_q_norm.weight", head)
        tensors.norm(prefix + "attn_k_norm.weight", head)
    return _finish(writer, path)


def write_mamba(path: Path) -> Path:
    """No attention at all: one running state a sequence."""
    inner, state, conv, rank = 128, 16, 4, 4
    writer = _writer(path, "mamba")
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    tensors = _Tensors(writer)
    tensors.outer()
    for layer in range(N_LAYERS):
        prefix = f"blk.{layer}."
        tensors.norm(prefix + "attn_norm.weight", N_EMBD)
        tensors.matrix(prefix + "ssm_in.weight", 2 * inner, N_EMBD)
        tensors.matrix(prefix + "ssm_conv1d.weight", inner, conv)
        tensors.norm(prefix + "ssm_conv1d.bias", inner)
        tensors.matrix(prefix + "ssm_x.weight", rank + 2 * state, inner)
        tensors.matrix(prefix + "ssm_dt.weight", inner, rank)
        tensors.norm(prefix + "ssm_dt.bias", inner)
        tensors.decay(prefix + "ssm_a", (inner, state))
        tensors.norm(prefix + "ssm_d", inner)
        tensors.matrix(prefix + "ssm_out.weight", N_EMBD, inner)
    return _finish(writer, path)


def write_falcon_h1(path: Path) -> Path:
    """Attention and a running state in every layer."""
    n_heads, n_kv_heads, n_ff = 4, 2, 96
    inner, state, conv, ssm_heads, groups = 128, 16, 4, 4, 1
    conv_width = inner + 2 * groups * state
    writer = _writer(path, "falcon-h1")
    _attention_metadata(writer, n_heads, n_kv_heads, n_ff)
    writer.add_key_length(N_EMBD // n_heads)
    writer.add_value_length(N_EMBD // n_heads)
    writer.add_ssm_conv_kernel(conv)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(ssm_heads)
    writer.add_ssm_group_count(groups)
    tensors = _Tensors(writer)
    tensors.outer()
    for layer in range(N_LAYERS):
        prefix = f"blk.{layer}."
        tensors.norm(prefix + "attn_norm.weight", N_EMBD)
        tensors.attention(layer, n_heads, n_kv_heads)
        tensors.matrix(prefix + "ssm_in.weight", 2 * inner + 2 * groups * state + ssm_heads, N_EMBD)
        tensors.matrix(prefix + "ssm_conv1d.weight", conv_width, conv)
        tensors.norm(prefix + "ssm_conv1d.bias", conv_width)
        tensors.norm(prefix + "ssm_dt.bias", ssm_heads)
        tensors.decay(prefix + "ssm_a", (ssm_heads, 1))
        tensors.decay(prefix + "ssm_d", (ssm_heads, 1))
        tensors.matrix(prefix + "ssm_norm.weight", groups, inner // groups)
        tensors.matrix(prefix + "ssm_out.weight", N_EMBD, inner)
        tensors.norm(prefix + "ffn_norm", N_EMBD)
        tensors.feed_forward(layer, n_ff)
    return _finish(writer, path)


class _Tensors:
    def __init__(self, writer: gguf.GGUFWriter, *, quantised: bool = False) -> None:
        self._writer = writer
        self._quantised = quantised
        self._random = np.random.default_rng(_RANDOM_SEED)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        values = self._random.standard_normal((rows, columns)) / np.sqrt(columns)
        if self._quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            self._writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
        else:
            self._writer.add_tensor(name, values.astype(np.float32))

    def norm(self, name: str, size: int) -> None:
        self._writer.add_tensor(name, (1 + 0.1 * self._random.standard_normal(size)).astype(np.float32))

    def decay(self, name: str, shape: tuple[int, ...]) -> None:
        self._writer.add_tensor(name, -self._random.uniform(0.5, 2.0, shape).astype(np.float32))

    def outer(self) -> None:
        self.matrix("token_embd.weight", N_VOCAB, N_EMBD)
        self.norm("output_norm.weight", N_EMBD)
        self.matrix("output.weight", N_VOCAB, N_EMBD)

    def attention(self, layer: int, n_heads: int, n_kv_heads: int) -> None:
        head = N_EMBD // n_heads
        self.matrix(f"blk.{layer}.attn_q.weight", n_heads * head, N_EMBD)
        self.matrix(f"blk.{layer}.attn_k.weight", n_kv_heads * head, N_EMBD)
        self.matrix(f"blk.{layer}.attn_v.weight", n_kv_heads * head, N_EMBD)
        self.matrix(f"blk.{layer}.attn_output.weight", N_EMBD, n_heads * head)

    def feed_forward(self, layer: int, n_ff: int) -> None:
        self.matrix(f"blk.{layer}.ffn_gate.weight", n_ff, N_EMBD)
        self.matrix(f"blk.{layer}.ffn_up.weight", n_ff, N_EMBD)
        self.matrix(f"blk.{layer}.ffn_down.weight", N_EMBD, n_ff)


def _writer(path: Path, architecture: str, *, n_layers: int = N_LAYERS) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny random {architecture}")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_vocab_size(N_VOCAB)
    specials = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"\u2581w{i}" for i in range(N_VOCAB - len(specials) - len(raw))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(specials + raw + words)
    writer.add_token_scores([0.0] * N_VOCAB)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(raw) + [gguf.TokenType.NORMAL] * len(words)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def _attention_metadata(writer: gguf.GGUFWriter, n_heads: int, n_kv_heads: int, n_ff: int) -> None:
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // n_heads)
    writer.add_rope_freq_base(10000.0)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
