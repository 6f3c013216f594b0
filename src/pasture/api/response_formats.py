"""Answers of `/v1/responses`: the response object, whole, and the events of its stream in OpenAI's order and shape.

    response.created, response.in_progress,
    output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done,
    and for each call of a tool: output_item.added, function_call_arguments.delta, .done, output_item.done,
    response.completed (or .incomplete, .failed)

A reply that is nothing but calls has no message. The events of one response are numbered. A delta is rendered around its text,
as in chats: no object is built for a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import orjson

from pasture.api.errors import problem
from pasture.api.formats import Explain, timings, wire_reason
from pasture.api.jobs import Job
from pasture.api.response_schemas import ResponseBody
from pasture.core.values import Finish, Usage
from pasture.text.replies import ToolCall

Json = dict[str, object]


class ResponseWriter:
    """Renders one response."""

    def __init__(self, job: Job, body: ResponseBody, explain: Explain, *, stored: bool) -> None:
        self._job = job
        self._explain = explain
        self._body = body
        self.stored = stored
        self.response_id = job.job_id
        self._item_id = "msg_" + job.job_id.removeprefix("resp_")
        self._n_events = 0
        self._message_open = False
        self._delta_tail = (
            b',"item_id":' + orjson.dumps(self._item_id) + b',"output_index":0,"content_index":0,"logprobs":[],"delta":'
        )

    def opening(self) -> bytes:
        """All events that come before any output."""
        started = self._response("in_progress", [], None)
        return self._event("response.created", {"response": started}) + self._event(
            "response.in_progress", {"response": started}
        )

    def delta(self, text: str) -> bytes:
        """More of the reply's text."""
        opening = b"" if self._message_open else self._open_message()
        self._n_events += 1
        return (
            opening
            + b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":%d'
            % (self._n_events - 1)
            + self._delta_tail
            + orjson.dumps(text)
            + b"}\n\n"
        )

    def closing(self, text: str, calls: Sequence[ToolCall], finish: Finish) -> bytes:
        """All events behind the text."""
        whole = self.whole(text, calls, finish) | self.told(finish)
        status = str(whole["status"])
        events = b"" if self._message_open or calls else self._open_message()
        if self._message_open:
            events += self._close_message(status, text)
        for index, call in enumerate(calls, int(self._message_open)):
            events += self._call(index, call)
        return events + self._event(f"response.{status}", {"response": whole})

    def failed(self, error: Exception) -> bytes:
        """The end of a stream that has begun and cannot go on."""
        told = orjson.loads(problem(error).body)["error"]
        response = self._response("failed", [], None)
        response["error"] = {"code": told["code"] or "server_error", "message": told["message"]}
        return self._event("response.failed", {"response": response})

    def whole(self, text: str, calls: Sequence[ToolCall], finish: Finish) -> Json:
        """The response object. Raises ShuttingDown for a reply that the server cut off."""
        status = "incomplete" if wire_reason(finish) == "length" else "completed"
        message = [self._item(status, text)] if text or not calls else []
        return self._response(status, [*message, *(_call_item(call, "completed") for call in calls)], finish.usage)

    def told(self, finish: Finish) -> Json:
        """What is added for a client that asked where its time and its prompt came from; not kept with the response."""
        return {"pasture": timings({0: finish}, self._explain)} if self._job.include_pasture else {}

    def _open_message(self) -> bytes:
        self._message_open = True
        return self._event("response.output_item.added", {"output_index": 0, "item": self._item("in_progress", None)}) + (
            self._event("response.content_part.added", {**self._place(), "part": _part("")})
        )

    def _close_message(self, status: str, text: str) -> bytes:
        item = self._item(status, text)
        return (
            self._event("response.output_text.done", {**self._place(), "text": text, "logprobs": []})
            + self._event("response.content_part.done", {**self._place(), "part": _part(text)})
            + self._event("response.output_item.done", {"output_index": 0, "item": item})
        )

    def _call(self, index: int, call: ToolCall) -> bytes:
        """A call's events; it is sent whole."""
        begun, done = _call_item(replace(call, arguments=""), "in_progress"), _call_item(call, "completed")
        place = {"item_id": done["id"], "output_index": index}
        return (
            self._event("response.output_item.added", {"output_index": index, "item": begun})
            + self._event("response.function_call_arguments.delta", {**place, "delta": call.arguments})
            + self._event("response.function_call_arguments.done", {**place, "name": call.name, "arguments": call.arguments})
            + self._event("response.output_item.done", {"output_index": index, "item": done})
        )

    def _response(self, status: str, output: list[Json], usage: Usage | None) -> Json:
        body = self._body
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._job.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._job.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": body.service_tier or "default",
            "store": self.stored,
            "temperature": self._job.choices[0].request.sampling.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": self._job.choices[0].request.sampling.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }

    def _item(self, status: str, text: str | None) -> Json:
        content = [] if text is None else [_part(text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _place(self) -> Json:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, fields: Mapping[str, object]) -> bytes:
        body = orjson.dumps({"type": kind, "sequence_number": self._n_events, **fields})
        self._n_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: ToolCall, status: str) -> Json:
    return {
        "id": "fc_" + call.call_id.removeprefix("call_"),
        "type": "function_call",
        "status": status,
        "call_id": call.call_id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
