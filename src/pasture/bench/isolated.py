"""The baseline: a server that gives every user an independent context, and shares nothing between them.

What a team gets that starts one llama.cpp context a person: the weights are loaded once, the cells are divided by the number
of contexts, and each context reuses the beginning of whatever it holds (as `llama_cpp.Llama` does) but never looks into
another one. A user keeps their context; when there are more users than contexts, the one unused for longest is taken over.

This is the one file outside `engine/` that imports `llama_cpp`: it is a peer, not a part of pasture. It uses the settings
that are fastest for it: every core for whoever's turn it is, prompts in batches of 512, an argmax instead of a sampler chain.
Turns go by request (first come, first served) or by decode call (as threads of equal rank would share the cores); the
benchmark measures both.

One thread a connection; contexts are guarded by their turn at the cores and by one lock over the table of users.
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

import llama_cpp
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

BATCH_TOKENS = 512
_LOG_LEVEL_ERROR = 4


def _print_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == _LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


_ONLY_ERRORS = llama_cpp.llama_log_callback(_print_errors)
"""kept for as long as llama.cpp may call it"""


class Turns:
    """A lock that is handed on in the order in which it was asked for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._busy = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The cores, for as long as the block runs."""
        with self._guard:
            mine = None
            if self._busy:
                mine = threading.Event()
                self._waiting.append(mine)
            self._busy = True
        if mine is not None:
            mine.wait()
        try:
            yield
        finally:
            with self._guard:
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._busy = False


class Context:
    """One llama.cpp context and the tokens it holds."""

    def __init__(self, model: llama_cpp.llama_model_p, n_cells: int, n_threads: int, n_vocab: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_cells
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = True
        handle = llama_cpp.llama_init_from_model(model, params)
        if handle is None:
            raise SystemExit("isolated: the contexts do not fit in memory")
        self._handle = handle
        self._memory = llama_cpp.llama_get_memory(handle)
        self._n_vocab = n_vocab
        self.n_cells = n_cells
        self.tokens: list[int] = []
        self.lock = threading.Lock()
        self.last_used = 0.0

    def keep(self, prompt: Sequence[int]) -> int:
        """Cut back to the longest common prefix with `prompt`, at most all but its last token; returns its length."""
        kept = 0
        while kept < min(len(self.tokens), len(prompt) - 1) and self.tokens[kept] == prompt[kept]:
            kept += 1
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, kept, -1):
            llama_cpp.llama_memory_clear(self._memory, True)
            kept = 0
        del self.tokens[kept:]
        return kept

    def decode(self, tokens: Sequence[int]) -> int:
        """Append up to a batch of tokens; returns the most probable next one."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self._handle, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.tokens.extend(tokens)
        logits = llama_cpp.llama_get_logits_ith(self._handle, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._n_vocab,)).argmax())


class Herdless:
    """The model, its contexts, and who has which."""

    def __init__(self, path: str, n_cells: int, n_contexts: int, n_threads: int, *, whole_requests: bool, repack: bool) -> None:
        llama_cpp.llama_log_set(_ONLY_ERRORS, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repack
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if model is None:
            raise SystemExit(f"isolated: cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        template = llama_cpp.llama_model_chat_template(model, None)
        if template is None:
            raise SystemExit("isolated: the model has no chat template")
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template.decode())
        per_context = n_cells // n_contexts // 256 * 256
        if per_context == 0:
            raise SystemExit(f"isolated: {n_cells} cells are too few for {n_contexts} contexts")
        self._contexts = [Context(model, per_context, n_threads, self.n_vocab) for _ in range(n_contexts)]
        self._of_user: dict[str, Context] = {}
        self._table = threading.Lock()
        self._turns = Turns()
        self._whole_requests = whole_requests
        self._ends = frozenset(token for token in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._template.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), add_special, parse_special)
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, count)]

    @contextmanager
    def context_of(self, user: str) -> Iterator[Context]:
        """The user's context, theirs alone until the block ends."""
        with self._table:
            context = self._of_user.get(user)
            if context is None:
                taken = list(self._of_user.values())
                unused = [candidate for candidate in self._contexts if candidate not in taken]
                context = unused[0] if unused else min(self._contexts, key=lambda candidate: candidate.last_used)
                for owner in [owner for owner, owned in self._of_user.items() if owned is context]:
                    del self._of_user[owner]
                self._of_user[user] = context
            context.last_used = time.monotonic()
        with context.lock:
            yield context

    def generate(self, context: Context, prompt: Sequence[int], max_tokens: int, *, to_the_end: bool) -> Iterator[int]:
        """Reply tokens. Prompt tokens that the context already holds are not computed again; call `keep` before."""
        whole, single = (self._turns.turn(), nullcontext) if self._whole_requests else (nullcontext(), self._turns.turn)
        with whole:
            token = prompt[-1]
            for start in range(len(context.tokens), len(prompt), BATCH_TOKENS):
                with single():
                    token = context.decode(prompt[start : min(start + BATCH_TOKENS, len(prompt))])
            for produced in range(max_tokens):
                if token in self._ends and not to_the_end:
                    return
                yield token
                if produced + 1 < max_tokens:
                    with single():
                        token = context.decode([token])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    herd: Herdless

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json({"status": "ok"})
        elif self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": "isolated", "object": "model"}]})
        else:
            self._json({"error": {"message": "not found"}}, status=404)

    def do_POST(self) -> None:
        body = cast(dict[str, object], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.path == "/tokenize":
            special, parse = bool(body.get("add_special")), bool(body.get("parse_special"))
            self._json({"tokens": self.herd.tokenize(str(body["content"]), add_special=special, parse_special=parse)})
        elif self.path == "/apply-template":
            self._json({"prompt": self.herd.render(cast(list[Mapping[str, str]], body["messages"]))})
        elif self.path == "/v1/chat/completions":
            self._chat(body)
        else:
            self._json({"error": {"message": "not found"}}, status=404)

    def _chat(self, body: Mapping[str, object]) -> None:
        herd = self.herd
        text = herd.render(cast(list[Mapping[str, str]], body["messages"]))
        prompt = herd.tokenize(text, add_special=True, parse_special=True)
        max_tokens = int(str(body.get("max_tokens") or 128))
        with herd.context_of(str(body.get("user", ""))) as context:
            if len(prompt) + max_tokens > context.n_cells:
                message = f"{len(prompt)} + {max_tokens} tokens do not fit in a context of {context.n_cells}"
                self._json({"error": {"message": message}}, status=400)
                return
            cached = context.keep(prompt)
            self._begin_stream()
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            count = 0
            for token in herd.generate(context, prompt, max_tokens, to_the_end=bool(body.get("ignore_eos"))):
                count += 1
                delta = decoder.decode(herd.piece(token))
                self._event({"choices": [{"index": 0, "delta": {"content": delta}, "finish_reason": None}]})
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": count,
            "total_tokens": len(prompt) + count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self._event({"choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def _event(self, value: object) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, value: object, *, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(prog="pasture.bench.isolated", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-c", "--cells", type=int, required=True)
    parser.add_argument("-t", "--threads", type=int, required=True)
    parser.add_argument("--contexts", type=int, required=True)
    parser.add_argument("--turn", choices=("request", "step"), default="request")
    parser.add_argument("--repack", action="store_true", help="let ggml rearrange the weights for this processor")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    _Handler.herd = Herdless(
        given.model, given.cells, given.contexts, given.threads, whole_requests=given.turn == "request", repack=given.repack
    )
    with _Server((given.host, given.port), _Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
