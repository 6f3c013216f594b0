"""`pasture bench turn-ahead`: the turn after a long piece of reasoning, with and without looking ahead.

The server gets a chat template that, like those of reasoning models, shows a reply without its reasoning once another message
follows. The small model marks no reasoning, so the template takes the first five sevenths of a reply's words for it: of a reply
of 700 tokens about 500 are reasoning and 200 answer. What the next turn finds of that reply is then nothing, unless somebody
has looked ahead while its user was reading. Each conversation has a first turn, a pause, and a second turn, which is
the one that is timed; both sides in alternation. One event loop, in the caller's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import fmean

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from pasture.bench.answering import Answer, run_and_answer
from pasture.bench.client import Chat, Exchange, Message, chat
from pasture.bench.corpus import passage, subjects
from pasture.bench.distinct import PromptTokens
from pasture.bench.options import BenchOptions
from pasture.bench.report import seconds
from pasture.bench.run import progress_bar
from pasture.bench.switched import Side, Switch, serving
from pasture.bench.systems import Running, SystemFailed

TURN_AHEAD = Switch("turn-ahead", ("--turn-ahead",), ("--no-turn-ahead",))
REASONING_TOKENS, ANSWER_TOKENS = 500, 200
CONVERSATIONS = 3
NOTES_TOKENS = 100
SHORT_REPLY_TOKENS = 4
"""of the turn that is timed: only the first one matters"""
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set words = message['content'].split() %}"
    f"{{{{ words[(words | length) * {REASONING_TOKENS} // {REASONING_TOKENS + ANSWER_TOKENS}:] | join(' ') }}}}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QUESTION = "Think aloud about {topic}, at length, and then tell me what follows from it."
_FOLLOW_UP = "And what does that mean for {topic}?"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn after a long reply."""

    side: str
    ttft_seconds: float
    prompt_tokens: int
    computed_tokens: int
    user_tokens: int
    """of the text that its user wrote"""

    @property
    def beyond_tokens(self) -> int:
        """Computed beyond what the user said."""
        return self.computed_tokens - self.user_tokens


def main(options: BenchOptions) -> int:
    """Exit status: 0 when measured, 1 when a system could not be."""
    return run_and_answer("turn-ahead", options, _measure)


def ratios(turns: Sequence[Turn]) -> Mapping[str, float]:
    """Mean TTFT and mean computed tokens, on over off."""
    off, on = _sides(turns)
    return {
        "ttft": fmean(turn.ttft_seconds for turn in on) / fmean(turn.ttft_seconds for turn in off),
        "computed": fmean(turn.computed_tokens for turn in on) / max(1.0, fmean(turn.computed_tokens for turn in off)),
    }


def table(turns: Sequence[Turn]) -> Table:
    """One row a side; the ratio is to the other one."""
    made = Table(title=f"the turn after {REASONING_TOKENS} tokens of reasoning and {ANSWER_TOKENS} of answer")
    for heading in ("", "turns", "first token", "longest", "computed", "beyond the user's words", "ratio of first token"):
        made.add_column(heading, justify="left" if not heading else "right")
    for index, side in enumerate(_sides(turns)):
        made.add_row(
            side[0].side,
            str(len(side)),
            seconds(fmean(turn.ttft_seconds for turn in side)),
            seconds(max(turn.ttft_seconds for turn in side)),
            f"{fmean(turn.computed_tokens for turn in side):.1f}",
            f"at most {max(turn.beyond_tokens for turn in side)}",
            f"[bold]{ratios(turns)['ttft']:.2f}x[/]" if index else "",
        )
    return made


def _sides(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    off, on = TURN_AHEAD.order(0)
    return [turn for turn in turns if turn.side == off.label], [turn for turn in turns if turn.side == on.label]


async def _measure(options: BenchOptions, folder: Path, console: Console) -> Answer:
    template = folder / "template.jinja"
    await asyncio.to_thread(_write, template)
    turns: list[Turn] = []
    with progress_bar(console) as progress:
        task = progress.add_task("turns", total=2 * options.repeat * (options.turns or CONVERSATIONS))
        for number in range(options.repeat):
            for side in TURN_AHEAD.order(number):
                flagged = Side(side.label, (*side.flags, "--chat-template-file", str(template)))
                async with serving(flagged, options, folder) as up:
                    turns += await _conversations(up, side.label, options, progress, task)
    found = {
        "turns": [asdict(turn) | {"beyond_tokens": turn.beyond_tokens} for turn in turns],
        "ratios": dict(ratios(turns)),
    }
    return Answer(found, [table(turns)])


async def _conversations(up: Running, side: str, options: BenchOptions, progress: Progress, task: TaskID) -> list[Turn]:
    tokens = await PromptTokens.of(up.system.endpoint)
    if tokens is None:
        raise SystemFailed(f"{up.system.label} does not tell its tokens")
    turns = []
    for number in range(options.turns or CONVERSATIONS):
        rng = Random(f"turn-ahead-{options.seed}-{number}")
        opening: Message = {"role": "system", "content": f"You think before you answer.\n\n{passage(rng, NOTES_TOKENS)}"}
        question: Message = {"role": "user", "content": _QUESTION.format(topic=rng.choice(subjects()))}
        first = await _ask(up, (opening, question), REASONING_TOKENS + ANSWER_TOKENS, options)
        await asyncio.sleep(options.think)
        said = _FOLLOW_UP.format(topic=rng.choice(subjects()))
        reply: Message = {"role": "assistant", "content": first.reply}
        second = await _ask(up, (opening, question, reply, {"role": "user", "content": said}), SHORT_REPLY_TOKENS, options)
        prompt_tokens = second.prompt_tokens or 0
        computed = prompt_tokens - (second.cached_tokens or 0)
        turns.append(Turn(side, second.ttft_seconds, prompt_tokens, computed, len(await tokens.reply(said))))
        progress.advance(task)
    return turns


async def _ask(up: Running, messages: tuple[Message, ...], max_tokens: int, options: BenchOptions) -> Exchange:
    request = Chat("reader", messages, max_tokens, up.model)
    exchange = await chat(up.system.endpoint, request, timeout_seconds=options.request_timeout)
    if exchange.error is not None:
        raise SystemFailed(f"{up.system.label}: {exchange.error}")
    return exchange


def _write(template: Path) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    template.write_text(TEMPLATE)
