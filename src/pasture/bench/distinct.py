"""Distinct prompt tokens: what an infinite cache, shared perfectly, would still have to compute.

Every prompt and every reply goes into one trie of token ids in the order of events; a prompt costs the tokens that the trie
did not hold yet, and at least one, because a model must see a last token to say what follows. A reply's last token was drawn
but never decoded, so it is not in the trie when its reply ends. Reply tokens are the reply's text tokenised again. Token ids
come from the server's own `/apply-template` and `/tokenize`, so this knows no vocabulary and no template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from jinja2.sandbox import ImmutableSandboxedEnvironment

from pasture.bench.client import Endpoint, Exchange, Message, call_json


class Trie:
    """Token sequences, merged at their common beginnings."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._root = _Node()

    def insert(self, tokens: Sequence[int]) -> int:
        """Add a sequence; returns how many of its tokens were new."""
        node = self._root
        new = 0
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = _Node()
                new += 1
            node = child
        self.n_tokens += new
        return new


class _Node:
    __slots__ = ("children",)

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}


class PromptTokens:
    """Token ids of prompts and replies, asked of a running server."""

    def __init__(self, endpoint: Endpoint, template: str | None) -> None:
        self._endpoint = endpoint
        self._template = None if template is None else ImmutableSandboxedEnvironment().from_string(template)

    @classmethod
    async def of(cls, endpoint: Endpoint) -> PromptTokens | None:
        """None where the server has no way to tell token ids."""
        try:
            rendered = await _rendered(endpoint, ({"role": "user", "content": "?"},))
            if rendered is not None:
                counter = cls(endpoint, None)
            else:
                template = (await call_json(endpoint, "/props") or {}).get("chat_template")
                if not isinstance(template, str):
                    return None
                counter = cls(endpoint, template)
            return counter if await counter.reply("a") else None
        except OSError:
            return None

    async def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Of a chat, up to where the reply begins."""
        if self._template is None:
            text = await _rendered(self._endpoint, messages) or ""
        else:
            text = self._template.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
        return await self._tokenize(text, special=True)

    async def reply(self, text: str) -> list[int]:
        return await self._tokenize(text, special=False)

    async def _tokenize(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": special}
        answer = await call_json(self._endpoint, "/tokenize", body) or {}
        return cast(list[int], answer.get("tokens") or [])


async def _rendered(endpoint: Endpoint, messages: Sequence[Message]) -> str | None:
    answer = await call_json(endpoint, "/apply-template", {"messages": list(messages)})
    prompt = answer.get("prompt") if answer is not None else None
    return prompt if isinstance(prompt, str) else None


async def distinct_prompt_tokens(warm_up: Exchange, exchanges: Sequence[Exchange], tokens: PromptTokens) -> tuple[int, int]:
    """Distinct prompt tokens of a run, and the size of the trie: the cells that a pool needs to hold all of it.

    What the warm-up asked is in the trie before, but not counted: its prompt begins as every prompt of a template does.
    """
    events: list[tuple[float, bool, list[int]]] = []
    for exchange in exchanges:
        if exchange.error is not None:
            continue
        prompt = await tokens.prompt(exchange.chat.messages)
        events.append((exchange.sent, True, prompt))
        events.append((exchange.ended, False, prompt + (await tokens.reply(exchange.reply))[:-1]))
    trie = Trie()
    trie.insert(await tokens.prompt(warm_up.chat.messages))
    distinct = 0
    for _, is_prompt, sequence in sorted(events, key=lambda event: event[0]):
        new = trie.insert(sequence)
        distinct += max(1, new) if is_prompt else 0
    return distinct, trie.n_tokens
