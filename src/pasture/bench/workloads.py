"""Six kinds of traffic, the same for every system given the same seed; five are made of real text.

    team     one system prompt of about 1,000 tokens; every user has a conversation of their own under it
    docs     users ask 1 to `turns` questions about one of a few documents of about 2,000 tokens, drawn by a Zipf law
    private  every user has a context of about 1,000 tokens of their own: nothing to share, not even the first words
    agents   one context of about 1,500 tokens, forked k ways at every step; the chosen branch becomes the context
    crowded  300 tokens in common, then about 700 of everybody's own, in a pool for a quarter of them
    trace    recorded traffic: `recorded` reads it

Owns what is asked, in which order and after which pause. Knows nothing of systems and clocks: a workload is a frozen value,
and `drive` plays it. Loops are closed: a user's next question waits for the answer to the last. Only recorded requests come
when they came. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from pasture.bench.corpus import CHARACTERS_PER_TOKEN, paragraphs, passage, subjects
from pasture.bench.options import Arrivals, BenchOptions, WorkloadName
from pasture.bench.recorded import Arrival, arrivals

TEMPLATE_TOKENS = 6
"""what a chat template adds to a message"""
N_DOCUMENTS = 4
QUOTING_SHARE = 0.8
"""of the questions, those that quote a line"""
QUOTED_WORDS = 18
MEAN_STAGGER_SECONDS = 1.0
MEAN_BRANCH_STAGGER_SECONDS = 0.2

DEFAULT_USERS = {
    WorkloadName.TEAM: 16,
    WorkloadName.DOCS: 16,
    WorkloadName.PRIVATE: 16,
    WorkloadName.AGENTS: 8,
    WorkloadName.CROWDED: 16,
    WorkloadName.TRACE: 16,
}
CROWDING = 4
"""times as many tokens as the pool of `crowded` has cells, sharing counted"""
CELL_MARGIN = 256
"""llama.cpp rounds a context up to a multiple of this"""
DEFAULT_TURNS = 3

# fmt: off
_NAMES = (
    "Ada", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Keiko", "Liam", "Mona",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Sven", "Tara", "Umar", "Vera", "Wanda", "Xavier", "Yuki", "Zoe",
)
# fmt: on

_QUESTIONS = (
    "What does Python's documentation mean by {topic}? Explain it to a colleague who writes Java all day, please.",
    "I keep seeing {topic} in the code I review. When should I use it, and when had I better not?",
    "Give me one short example of {topic} that I could show in this afternoon's meeting.",
    "My program fails near something to do with {topic}. Which three mistakes are the most common there?",
    "How does {topic} relate to what you have just told me? Two sentences are enough.",
    "Is there a rule in our handbook about {topic}? Quote it if there is, and say so if there is none.",
    "Please compare {topic} with {other}: which of the two would you teach first, and why?",
    "What changes for {topic} when the code runs in several threads at once?",
)

_INSTRUCTIONS = (
    "Propose the next step of the plan; think about {topic} first and keep it short.",
    "Act as a sceptical reviewer: what could go wrong with {topic} in this plan?",
    "Write the smallest test that would show whether {topic} behaves as described.",
    "Suggest a simpler alternative that avoids {topic} altogether.",
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One user: an opening that stays, then questions, each after a pause."""

    user: str
    opening: str
    questions: tuple[str, ...]
    pauses_seconds: tuple[float, ...]
    """before each question; the first is the user's arrival"""


@dataclass(frozen=True, slots=True)
class Step:
    """One fork: every branch is asked at once, then the chosen one becomes part of the context."""

    instructions: tuple[str, ...]
    delays_seconds: tuple[float, ...]
    """of each branch, from the start of the step"""
    pause_seconds: float
    chosen: int


@dataclass(frozen=True, slots=True)
class ForkingAgent:
    """One context that is forked at every step."""

    opening: str
    steps: tuple[Step, ...]


Actor = Conversation | ForkingAgent | Arrival


@dataclass(frozen=True, slots=True)
class Workload:
    name: WorkloadName
    users: int
    max_tokens: int
    actors: tuple[Actor, ...]

    @property
    def n_requests(self) -> int:
        """How many replies a complete run has."""
        return sum(len(_asked(actor)) for actor in self.actors)

    @property
    def longest_tokens(self) -> int:
        """An upper estimate of the longest conversation, prompt and replies together."""
        return max(_longest(actor, self.max_tokens) for actor in self.actors)

    @property
    def opening_tokens(self) -> int:
        """An estimate of the distinct openings, each counted once."""
        return sum(_tokens(opening) + TEMPLATE_TOKENS for opening in {_opening(actor) for actor in self.actors})

    @property
    def pool_tokens(self) -> int:
        """An estimate of the tokens of the whole run when every common beginning is counted once."""
        own = 0
        for actor in self.actors:
            own += sum(_tokens(question) + 2 * TEMPLATE_TOKENS + self.max_tokens for question in _asked(actor))
        return self.opening_tokens + own


def build(options: BenchOptions, *, users: int | None = None) -> Workload:
    """The workload that `options` describe; `users` overrides theirs."""
    name = options.workload
    n_users = users or options.users or DEFAULT_USERS[name]
    n_turns = options.turns or DEFAULT_TURNS
    rng = Random(f"{name}-{options.seed}")
    actors: tuple[Actor, ...]
    if name is WorkloadName.TRACE:
        actors = arrivals(options)
    elif name is WorkloadName.AGENTS:
        actors = (_agent(rng, n_users, n_turns, options),)
    else:
        opening = _openings(name, rng, n_users)
        begins = _arrivals(rng, n_users, options.arrivals, MEAN_STAGGER_SECONDS)
        lengths = [rng.randint(1, n_turns) if name is WorkloadName.DOCS else n_turns for _ in range(n_users)]
        actors = tuple(
            Conversation(
                user=_user(index),
                opening=opening(index),
                questions=_questions(rng, length),
                pauses_seconds=(begins[index], *(_pause(rng, options.think_time) for _ in range(length - 1))),
            )
            for index, length in enumerate(lengths)
        )
    return Workload(name, n_users, options.max_tokens, actors)


def crowded_cells(workload: Workload) -> int:
    """Cells for about a quarter of a workload; a whole conversation at least."""
    shared = _tokens(_common_beginning([_opening(actor) for actor in workload.actors]))
    needed = workload.pool_tokens - (len(workload.actors) - 1) * shared
    return rounded_cells(max(needed // CROWDING, workload.longest_tokens))


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def rounded_cells(cells: int) -> int:
    """As many as llama.cpp makes of them."""
    return -(-cells // CELL_MARGIN) * CELL_MARGIN


def _user(index: int) -> str:
    name = _NAMES[index % len(_NAMES)]
    return name if index < len(_NAMES) else f"{name} {index // len(_NAMES) + 1}"


def _openings(name: WorkloadName, rng: Random, n_users: int) -> Callable[[int], str]:
    if name is WorkloadName.TEAM:
        handbook = (
            "You are the help desk for the Python language in a software company. Answer briefly, in plain words, and only "
            "from the handbook below.\n\nHandbook\n\n" + passage(rng, 960)
        )
        return lambda _: handbook
    if name is WorkloadName.DOCS:
        documents = [
            f"Document {index + 1} of the library. Answer questions about it and nothing else.\n\n{passage(rng, 2050)}"
            for index in range(N_DOCUMENTS)
        ]
        weights = [1 / (rank + 1) for rank in range(N_DOCUMENTS)]
        chosen = rng.choices(range(N_DOCUMENTS), weights=weights, k=n_users)
        return lambda index: documents[chosen[index]]
    if name is WorkloadName.CROWDED:
        house_rules = f"You help people with their notes, and follow the rules of the house.\n\n{passage(rng, 280)}"
        notes = [f"{house_rules}\n\nThe notes of {_user(index)}:\n\n{passage(rng, 700)}" for index in range(n_users)]
        return lambda index: notes[index]
    private = [f"{_user(index)}'s own notes, for nobody else.\n\n{passage(rng, 1040)}" for index in range(n_users)]
    return lambda index: private[index]


def _questions(rng: Random, n_turns: int) -> tuple[str, ...]:
    questions = []
    for _ in range(n_turns):
        topic, other = rng.sample(subjects(), 2)
        question = rng.choice(_QUESTIONS).format(topic=f'"{topic}"', other=f'"{other}"')
        if rng.random() < QUOTING_SHARE:
            question += f' I have just read: "{" ".join(rng.choice(paragraphs()).split()[:QUOTED_WORDS])} ..."'
        questions.append(question)
    return tuple(questions)


def _agent(rng: Random, n_branches: int, n_steps: int, options: BenchOptions) -> ForkingAgent:
    opening = "You plan a refactoring of a Python code base, step by step. What you know so far:\n\n" + passage(rng, 1580)
    steps = []
    for index in range(n_steps):
        topics = [rng.choice(subjects()) for _ in range(n_branches)]
        steps.append(
            Step(
                instructions=tuple(
                    f"Branch {branch + 1}. {_INSTRUCTIONS[branch % len(_INSTRUCTIONS)].format(topic=repr(topic))}"
                    for branch, topic in enumerate(topics)
                ),
                delays_seconds=_arrivals(rng, n_branches, options.arrivals, MEAN_BRANCH_STAGGER_SECONDS),
                pause_seconds=_pause(rng, options.think_time) if index else 0.0,
                chosen=rng.randrange(n_branches),
            )
        )
    return ForkingAgent(opening, tuple(steps))


def _arrivals(rng: Random, n: int, arrivals: Arrivals, mean_seconds: float) -> tuple[float, ...]:
    if arrivals is Arrivals.SIMULTANEOUS:
        return (0.0,) * n
    return (0.0, *accumulate(rng.expovariate(1 / mean_seconds) for _ in range(n - 1)))


def _pause(rng: Random, mean_seconds: float) -> float:
    return rng.expovariate(1 / mean_seconds) if mean_seconds else 0.0


def _asked(actor: Actor) -> tuple[str, ...]:
    """Everything that its users say, one text a request."""
    if isinstance(actor, Arrival):
        return (actor.text,)
    return actor.questions if isinstance(actor, Conversation) else tuple(i for s in actor.steps for i in s.instructions)


def _opening(actor: Actor) -> str:
    return "" if isinstance(actor, Arrival) else actor.opening


def _longest(actor: Actor, max_tokens: int) -> int:
    if isinstance(actor, Arrival):
        return actor.prompt_tokens + actor.reply_tokens + 4 * TEMPLATE_TOKENS
    if isinstance(actor, Conversation):
        said = [actor.opening, *actor.questions]
        replies = len(actor.questions)
    else:
        said = [actor.opening, *(max(step.instructions, key=len) for step in actor.steps)]
        replies = len(actor.steps)
    return sum(map(_tokens, said)) + (len(said) + replies) * TEMPLATE_TOKENS + replies * max_tokens


def _tokens(text: str) -> int:
    return int(len(text) / CHARACTERS_PER_TOKEN * 1.02)
