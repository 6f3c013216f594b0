"""Reading traces: both formats, gzipped or not, and files that are neither."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pasture.core.errors import ConfigError
from pasture.core.values import Kind
from pasture.foresight.traces import TraceRequest, read_trace


def write(file: Path, rows: list[object]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def turn(t: float, n: int, ranges: list[list[int]], stop: str = "end_turn", **more: object) -> dict[str, object]:
    return {"t": t, "type": "n", "in": n, "stop": stop, "hash_ranges": ranges, **more}


def session(requests: list[dict[str, object]]) -> dict[str, object]:
    return {"id": "x", "block_size": 64, "requests": requests}


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_comes_out_in_order_of_time(tmp_path: Path, name: str) -> None:
    rows: list[object] = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 2]},
        {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]},
    ]
    first, second = TraceRequest(0.0, 700, (0, 1), n_reply_tokens=5), TraceRequest(3.0, 600, (0, 2), n_reply_tokens=5)
    assert read_trace(write(tmp_path / name, rows)) == [first, second]


def test_coding_sessions_are_staggered_and_their_blocks_joined_and_chained(tmp_path: Path) -> None:
    first = [turn(0.0, 1024, [[1, 16]], "tool_use", api_time=4.0), turn(9.0, 1536, [[1, 8], [20, 35]])]
    rows: list[object] = [session(first), session([turn(0.0, 1024, [[1, 16]])])]
    a, b, other = read_trace(write(tmp_path / "c.jsonl", rows), session_seconds=30.0)
    assert (a.at, b.at, other.at) == (0.0, 9.0, 30.0)
    assert (a.expects, a.finished_at, b.expects, b.finished_at) == (Kind.TOOL, 4.0, Kind.CHAT, None)
    assert [len(one.blocks) for one in (a, b, other)] == [2, 3, 2]
    assert a.blocks[0] == b.blocks[0], "the first 8 small blocks are the same"
    assert not set(a.blocks[1:]) & set(b.blocks[1:])
    assert not set(other.blocks) & {*a.blocks, *b.blocks}, "ids are local to a session"


def test_the_requests_of_sub_agents_are_requests(tmp_path: Path) -> None:
    agent = {"t": 5.0, "type": "subagent", "agent_id": "a", "requests": [turn(1.0, 512, [[50, 57]])]}
    rows: list[object] = [session([turn(0.0, 512, [[1, 8]]), agent, turn(20.0, 1024, [[1, 16]])])]
    assert [one.at for one in read_trace(write(tmp_path / "c.jsonl", rows))] == [0.0, 6.0, 20.0]


@pytest.mark.parametrize(
    "content", ["", "no json\n", '{"a": 1}\n', "[1]\n", '{"timestamp": "x", "input_length": 1, "hash_ids": []}\n']
)
def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.jsonl"):
        read_trace(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(broken)
