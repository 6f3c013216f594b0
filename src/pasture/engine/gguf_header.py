"""The header of a GGUF file, read without llama.cpp: what is in the file and what a token of its KV costs.

It answers two questions before any C code sees the file. Is this a whole GGUF file? (A wrong magic, a version nobody
writes, a header that ends early, tensors that lie beyond the end of the file: each is a `ModelError` of one line.) And how
large is the model and its KV, so that `pasture check` and `--kv-memory` need not load it.

Format: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3, little endian. Long arrays (the vocabulary) are
skipped, not kept. Stateless.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pasture.core.errors import ModelError

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_KEPT_ARRAY = 4096
"""longer arrays are skipped; per-layer values are far shorter"""
_MAX_DIMENSIONS = 8
_MAX_COUNT = 1 << 24


_PART_NAME = re.compile(r"-\d{5}-of-(\d{5})(?=\.gguf$)")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata and sizes of one file."""

    path: Path
    file_bytes: int
    metadata: Mapping[str, Value]
    array_lengths: Mapping[str, int]
    n_params: int
    tensor_names: frozenset[str]
    tensor_types: frozenset[int]
    """GGML_TYPE_* of all tensors"""

    @property
    def architecture(self) -> str:
        return self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def number(self, suffix: str, default: int = 0) -> int:
        """`{architecture}.{suffix}`; an array's first value where the file has one a layer."""
        return self.numbers(suffix, 1, default)[0]

    def numbers(self, suffix: str, count: int, default: int = 0) -> tuple[int, ...]:
        """One value a layer, whether the file has one for all or one for each."""
        value = self.metadata.get(f"{self.architecture}.{suffix}", default)
        values = value if isinstance(value, tuple) else (value,) * count
        whole = tuple(int(v) for v in values if isinstance(v, int | float) and math.isfinite(v))
        return (whole + (default,) * count)[:count]


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._size = len(data)
        self._path = path
        self.offset = 0

    def skip(self, count: int) -> int:
        start = self.offset
        if count < 0 or start + count > self._size:
            raise ModelError(f"{self._path} is cut short: its header ends beyond the {self._size} bytes of the file")
        self.offset = start + count
        return start

    def scalar(self, code: str) -> Scalar:
        layout = struct.Struct("<" + code)
        value: Scalar = layout.unpack_from(self._data, self.skip(layout.size))[0]
        return value

    def count(self, code: str = "Q") -> int:
        return int(self.scalar(code))

    def string(self) -> str:
        length = self.count()
        start = self.skip(length)
        return self._data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int) -> tuple[Value | None, int]:
        """The value (None: a long array, skipped) and its length."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind]), 1
        if kind == _STRING:
            return self.string(), 1
        if kind != _ARRAY:
            raise ModelError(f"{self._path} is damaged: metadata of unknown type {kind}")
        item_kind, length = self.count("I"), self.count()
        if item_kind == _STRING:
            for _ in range(length):
                self.skip(self.count())
            return None, length
        if item_kind not in _SCALARS:
            raise ModelError(f"{self._path} is damaged: an array of unknown type {item_kind}")
        layout = struct.Struct("<" + _SCALARS[item_kind])
        start = self.skip(length * layout.size)
        if length > _KEPT_ARRAY:
            return None, length
        return struct.unpack_from(f"<{length}{_SCALARS[item_kind]}", self._data, start), length


def model_files(path: Path) -> list[Path]:
    """The file, or all parts of a model that was split as llama.cpp splits them."""
    part = _PART_NAME.search(path.name)
    if part is None:
        return [path]
    count = int(part.group(1))
    names = (_PART_NAME.sub(f"-{number:05d}-of-{count:05d}", path.name) for number in range(1, count + 1))
    return [other for other in (path.with_name(name) for name in names) if other.exists()]


def read_header(path: str | Path) -> GgufHeader:
    """The header of the file at `path`. Raises ModelError where it is missing, not GGUF, or cut short."""
    path = Path(path)
    if not path.exists():
        raise ModelError(f"there is no model file at {path}")
    if not path.is_file():
        raise ModelError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Reader(data, path), path, len(data))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


def _parse(reader: _Reader, path: Path, file_bytes: int) -> GgufHeader:
    reader.skip(4)
    version = reader.count("I")
    if version not in (2, 3):
        raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    n_tensors, n_values = reader.count(), reader.count()
    if max(n_tensors, n_values) > _MAX_COUNT:
        raise ModelError(f"{path} is damaged: it claims {n_tensors} tensors and {n_values} metadata values")
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(n_values):
        key = reader.string()
        value, lengths[key] = reader.value(reader.count("I"))
        if value is not None:
            metadata[key] = value
    names: set[str] = set()
    types: set[int] = set()
    n_params, last_offset = 0, 0
    for _ in range(n_tensors):
        names.add(reader.string())
        n_dimensions = reader.count("I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ModelError(f"{path} is damaged: a tensor of {n_dimensions} dimensions")
        n_params += math.prod(reader.count() for _ in range(n_dimensions))
        types.add(reader.count("I"))
        last_offset = max(last_offset, reader.count())
    if n_tensors and reader.offset + last_offset >= file_bytes:
        raise ModelError(f"{path} is cut short: its tensors end beyond the {file_bytes} bytes of the file")
    return GgufHeader(path, file_bytes, metadata, lengths, n_params, frozenset(names), frozenset(types))
