"""Other pasture servers that sessions may be sent to: the operator's list, and the sending.

A client names a peer, never an address: where a request may go from here is decided by who runs the server, and by nobody else.
No redirect is followed, no proxy is asked, and of an answer only so much is read as a session's description needs. Sending
blocks; it belongs on a worker thread.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import orjson

from pasture.core.errors import ConfigError, Conflict, NotFound, PeerFailed, RequestError

SEND_SECONDS = 120.0
MAX_ANSWER_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Peer:
    """One other server."""

    name: str
    url: str
    key: str | None = None
    """of the tenant there that gets what clients send without a key of their own"""


def parse_peers(given: Iterable[str], keys: Mapping[str, str]) -> tuple[Peer, ...]:
    """Peers from `NAME=URL`. Raises ConfigError for what cannot be one, and for a key of a peer that there is not."""
    peers: dict[str, Peer] = {}
    for text in given:
        name, _, url = text.partition("=")
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment or parts.username)
        if not _NAME.fullmatch(name) or not usable:
            raise ConfigError(f"peer: {text!r} is not NAME=URL with a URL that begins with http:// or https://")
        if name in peers:
            raise ConfigError(f"peer: there are two named {name}")
        peers[name] = Peer(name, url.rstrip("/"), keys.get(name))
    strangers = keys.keys() - peers.keys()
    if strangers:
        raise ConfigError(f"peer_key_file: there is no peer {', '.join(sorted(strangers))}")
    return tuple(peers.values())


def parse_keys(text: str) -> dict[str, str]:
    """Keys from lines of `NAME=KEY`; `#` begins a comment. Raises ConfigError that does not show the line."""
    keys = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.partition("="))
        if not name or not key:
            raise ConfigError(f"peer_key_file: line {number} is not NAME=KEY")
        keys[name] = key
    return keys


def chosen(peers: Iterable[Peer], wanted: str) -> Peer:
    """The peer with this name, or this very URL. Raises NotFound."""
    for peer in peers:
        if wanted in (peer.name, peer.url, peer.url + "/"):
            return peer
    raise NotFound("there is no such peer; the operator lists those that there are", param="peer")


def send(peer: Peer, key: str | None, file: bytes) -> tuple[str, int]:
    """Have a peer import an exported session; returns its id there, and how many tokens of KV arrived. Blocks.

    `key`: the client's own at the peer. Raises RequestError where there is none at all, Conflict for what the peer refuses,
    PeerFailed when it cannot be reached or answers nonsense.
    """
    key = key or peer.key
    if key is None:
        raise RequestError("this peer needs your key there: target_key", param="target_key")
    try:
        status, body = _post(peer, key, file)
    except (OSError, http.client.HTTPException) as error:
        raise PeerFailed(f"the peer {peer.name} cannot be reached: {type(error).__name__}") from error
    try:
        answer = orjson.loads(body)
        if status == 201:
            return str(answer["id"]), int(answer["restored_tokens"])
        message = str(answer["error"]["message"])[:500]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise PeerFailed(f"the peer {peer.name} did not answer as pasture does (status {status})") from None
    if status >= 500:
        raise PeerFailed(f"the peer {peer.name} failed: {message}")
    raise Conflict(f"the peer {peer.name} refused the session: {message}", param="peer")


def _post(peer: Peer, key: str, file: bytes) -> tuple[int, bytes]:
    parts = urlsplit(peer.url)
    assert parts.hostname is not None  # parse_peers has looked
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=SEND_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=SEND_SECONDS)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/vnd.pasture.session"}
        connection.request("POST", f"{parts.path}/v1/sessions/import", file, headers)
        response = connection.getresponse()
        return response.status, response.read(MAX_ANSWER_BYTES)
    finally:
        connection.close()
