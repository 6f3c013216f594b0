"""The only module that imports `llama_cpp`: typed names for the handful of C functions pasture calls.

Owns the process-wide state of the library: its backend is initialised once, and everything it prints goes to the logger
`pasture.llama` instead of stderr. The last error lines are kept, because a failed load returns nothing but a null pointer
and its reason is in the log.

Handles are plain addresses (`Handle`); whoever creates one frees it. Nothing here knows about pools, plans or requests.
Any thread may read the log; the library's own rules say which thread may call what (one thread a context).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NewType, cast

import llama_cpp

lib: Any = llama_cpp.llama_cpp
"""The C functions by their own names. ctypes checks arguments when they are called; their stubs fit no real pointer."""

Handle = NewType("Handle", int)
"""The address of a C object."""

VERSION: str = llama_cpp.__version__


def _build() -> str:
    library = os.stat(lib._lib._name)
    return f"{VERSION}-{library.st_size}-{library.st_mtime_ns}"


BUILD: str = _build()
"""another string after the library was built anew"""

MAX_SEQUENCES = 256
"""LLAMA_MAX_SEQ"""

PLAIN_TYPES = frozenset({0, 1, 30})
"""GGML_TYPE_F32, _F16 and _BF16: weights that are not quantised"""

KV_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "iq4_nl": 20,
}
"""name -> ggml type number, for the types llama.cpp takes as `-ctk` and `-ctv`"""

DECODED = 0
NO_SLOT = 1
ABORTED = 2
"""llama_decode's answers: all is well; no room for the batch; it was told to stop"""

ROTATION_SWITCH = "LLAMA_ATTN_ROT_DISABLE"
"""environment variable: 1 makes the library store quantised K and V without the Hadamard rotation it gives them otherwise"""

FLASH_ATTENTION_OFF = 0
FLASH_ATTENTION_ON = 1
LOAD_READ = 0
LOAD_MMAP = 1
LOAD_MLOCK = 2
LOAD_MMAP_MLOCK = 3

_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
"""ggml_log_level -> ours, one step quieter: what matters to a user we raise or say ourselves"""
_ERROR_LEVEL = 4

_STRLEN = ctypes.cast(ctypes.CDLL(None).strlen, lib.ggml_abort_callback)

logger = logging.getLogger("pasture.llama")


def progress_callback(on_progress: Callable[[float], None] | None) -> object | None:
    """What the library calls while it reads a model; whoever gives it to the library holds it. None for nobody who hears."""
    if on_progress is None:
        return None

    def hear(share: float, _: object) -> bool:
        on_progress(share)
        return True  # go on

    callback: object = lib.llama_progress_callback(hear)
    return callback


class LibraryLog:
    """What the library printed, line by line, to `pasture.llama`; remembers the latest errors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line = ""
        self._level = 1
        self._errors: deque[str] = deque(maxlen=16)

    def write(self, level: int, text: str) -> None:
        with self._lock:
            if level in _LEVELS:
                self._level = level
            self._line += text
            *lines, self._line = self._line.split("\n")
            for line in filter(None, (line.rstrip() for line in lines)):
                if self._level == _ERROR_LEVEL:
                    self._errors.append(line)
                logger.log(_LEVELS[self._level], "%s", line)

    @contextmanager
    def errors(self) -> Iterator[deque[str]]:
        """The error lines printed while the block runs, oldest first."""
        with self._lock:
            self._errors.clear()
        yield self._errors


library_log = LibraryLog()


def _on_log(level: int, text: bytes, _user_data: int) -> None:
    library_log.write(level, text.decode("utf-8", "replace"))


_log_callback = lib.llama_log_callback(_on_log)


_initialised = False


def initialise() -> None:
    """Bring the library up; later calls do nothing."""
    global _initialised
    if not _initialised:
        _initialised = True
        lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
        lib.llama_backend_init()


@contextmanager
def without_rotation() -> Iterator[None]:
    """Contexts made inside store quantised K and V as they are. Changes this process's environment meanwhile."""
    before = os.environ.get(ROTATION_SWITCH)
    os.environ[ROTATION_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ROTATION_SWITCH]
        else:
            os.environ[ROTATION_SWITCH] = before


def ggml_function(*names: str) -> Any | None:
    """The first of these ggml functions that the loaded libraries export; untyped: its arguments must be ctypes values."""
    return next((getattr(lib._lib, name) for name in names if hasattr(lib._lib, name)), None)


def multiplies_bf16() -> bool:
    """Whether the library was built for a CPU with its own instruction for products of bf16, and so are its matrix kernels."""
    asked = ggml_function("ggml_cpu_has_avx512_bf16")
    return bool(asked and asked())


class Brake:
    """Stops decodes from another thread.

    llama.cpp asks a C function between two operations whether to go on. One written in Python would have every one of them
    wait for the interpreter, so it is C's own `strlen` of a text of no character, or of one: any thread may write that.
    """

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)

    def set(self, stops: bool) -> None:
        self._text[0] = b"!" if stops else b"\0"

    @property
    def is_set(self) -> bool:
        return self._text[0] != b"\0"

    def watch(self, context: Handle) -> None:
        """Have this context's decodes end with `ABORTED` while the brake is set. It must live as long as the context."""
        lib.llama_set_abort_callback(context, _STRLEN, self._text)


def handle(address: object) -> Handle | None:
    """None for a null pointer."""
    return Handle(cast(int, address)) if address else None


def text_of(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode("utf-8", "replace")


def model_text(model: Handle, key: str) -> str | None:
    """A scalar of the file's metadata as text."""
    buffer = ctypes.create_string_buffer(1024)
    length = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return None if length < 0 else text_of(buffer.value)


def model_description(model: Handle) -> str:
    buffer = ctypes.create_string_buffer(256)
    lib.llama_model_desc(model, buffer, len(buffer))
    return text_of(buffer.value) or ""
