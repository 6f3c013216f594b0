"""Messages or text -> the token ids of a prompt.

Owns the rule about the BOS token: the tokeniser adds it, unless the text begins with it already (most chat templates print
it, and a prompt rendered elsewhere carries it), so that no prompt has two. Special tokens written out in the text are read as
such, as llama-server reads them. Immutable; any thread may call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pasture.core.errors import RequestError
from pasture.core.ports import Vocabulary
from pasture.text.messages import Message
from pasture.text.templates import ChatTemplate
from pasture.text.tool_calls import dialect_of


def token_text(vocabulary: Vocabulary, token: int | None) -> str:
    """A token as it is written in templates, control tokens included; "" for a token the model does not have."""
    return "" if token is None else vocabulary.piece(token, special=True).decode("utf-8", errors="replace")


class Prompts:
    """Prompts for one model. `chat_template` replaces the model's own."""

    def __init__(self, vocabulary: Vocabulary, chat_template: str | None = None) -> None:
        self._vocabulary = vocabulary
        source = vocabulary.chat_template if chat_template is None else chat_template
        self.template = ChatTemplate(
            source, bos=token_text(vocabulary, vocabulary.bos), eos=token_text(vocabulary, vocabulary.eos)
        )
        self.dialect = dialect_of(self.template.source)
        """how the model calls tools, where that is known"""

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """The rendered conversation as tokens. Raises RequestError as `ChatTemplate.render` does."""
        text = self.template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.text(text, param="messages")

    def text(self, text: str, *, param: str = "prompt") -> tuple[int, ...]:
        """Plain text as tokens. Raises RequestError when there are none."""
        has_bos = bool(self.template.bos) and text.startswith(self.template.bos)
        tokens = self._vocabulary.tokenize(text, add_special=not has_bos, parse_special=True)
        if not tokens:
            raise RequestError("the prompt is empty", param=param)
        return tuple(tokens)

    def tokens(self, tokens: Sequence[int], *, param: str = "prompt") -> tuple[int, ...]:
        """Token ids taken as they are. Raises RequestError for none, or for one that the vocabulary does not have."""
        if not tokens:
            raise RequestError("the prompt is empty", param=param)
        n_tokens = self._vocabulary.n_tokens
        for token in tokens:
            if not 0 <= token < n_tokens:
                raise RequestError(f"token {token} is not in the vocabulary (0 to {n_tokens - 1})", param=param)
        return tuple(tokens)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens written out. Raises RequestError for a token that does not exist."""
        known = self.tokens(tokens, param="tokens") if tokens else ()
        return b"".join(self._vocabulary.piece(token, special=True) for token in known).decode("utf-8", errors="replace")
