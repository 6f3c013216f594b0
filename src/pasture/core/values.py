"""The values that travel between the rooms: requests, sampling parameters, plans, results.

Frozen, without behaviour beyond small derivations, and without knowledge of llama.cpp. Positions are half open `[p0, p1)`
throughout; a *cell* holds the key and value vectors of one token of one or more sequences.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from pasture.core.errors import PastureError, RequestError

SeqId = NewType("SeqId", int)
"""A sequence id of the engine, `0 <= id < n_seq_max`."""

RequestId = NewType("RequestId", str)
Namespace = NewType("Namespace", str)
"""What may share: two requests reuse each other's tokens only inside one namespace."""

DEFAULT_NAMESPACE = Namespace("default")
PUBLIC_NAMESPACE = Namespace("public")
"""holds texts that the operator has declared to be no secret"""


class Layout(StrEnum):
    """How cells are laid out in the live cache."""

    UNIFIED = "unified"
    """One buffer for every sequence: a shared cell exists once."""
    STREAMS = "streams"
    """One buffer a sequence: no masked cells to skip, but a shared prefix is a copy."""


class Weights(StrEnum):
    """What a model's weights are multiplied as."""

    AUTO = "auto"
    """whichever is measured to carry more people here; as in the file without a self-check"""
    FILE = "file"
    """as they are in the file"""
    F16 = "f16"
    """written out as f16, two bytes a parameter"""
    BF16 = "bf16"
    """written out as bf16, two bytes a parameter: less exact than f16, quicker on a CPU that multiplies it itself"""

    @property
    def is_copy(self) -> bool:
        """Whether a quantised file is written out for it."""
        return self in (Weights.F16, Weights.BF16)


class Form(StrEnum):
    """How stored KV is written down, from what was computed to what is smallest."""

    RAW = "raw"
    """the bytes of the live cache"""
    LOSSLESS = "lossless"
    """the same, byte planes through zstd"""
    Q8_0 = "q8_0"
    """ggml's blocks of 32 with 8 bits a value"""
    Q4_0 = "q4_0"
    """ggml's blocks of 32 with 4 bits a value"""


class Kind(StrEnum):
    """What is expected after a request: it says how soon its blocks may be wanted again, if ever."""

    CHAT = "chat"
    """a person reads, thinks and types"""
    TOOL = "tool"
    """the reply calls a tool, whose result comes back"""
    BATCH = "batch"
    """nothing: one prompt of many, and the next one is another"""


class FinishReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class ConstraintKind(StrEnum):
    """The language that a constraint is written in."""

    JSON_SCHEMA = "json schema"
    GBNF = "gbnf"
    """llama.cpp's grammars, which begin at `root`"""
    REGEX = "regex"
    """Rust's, without anchors: all of the reply matches"""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a reply must be from its first character to its last."""

    kind: ConstraintKind
    text: str
    param: str | None = field(default=None, compare=False)
    """what the request calls it, for errors"""
    before: str = ""
    """stands before what suits a JSON schema"""
    after: str = ""
    """stands behind it"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn; defaults are llama.cpp's. `temperature=0` is greedy."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token id -> added to its logit; `-inf` bans the token"""
    constraint: Constraint | None = None
    """tokens that do not suit it are banned, before anything else looks at them"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a tenant may hold of KV, and what it is guaranteed. None: no limit of its own."""

    weight: float = 1.0
    """of its turn, and of what is guaranteed, among the tenants, against a usual 1"""
    live_cells: int | None = None
    """in the live cache at once"""
    ram_bytes: int | None = None
    disk_bytes: int | None = None
    guaranteed_share: float | None = None
    """0..1 of the live cache and of each tier, that others cannot push it below; None: by weight"""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued once (`n` choices are `n` requests that share their prompt)."""

    request_id: RequestId
    prompt: tuple[int, ...]
    """token ids, at least one"""
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    namespace: Namespace = DEFAULT_NAMESPACE
    tenant: str = "default"
    user: str = "anonymous"
    stop_tokens: frozenset[int] = frozenset()
    """ends the reply, is not part of it; empty when end-of-generation tokens are ignored"""
    n_logprobs: int | None = None
    """alternatives reported a token; None: no log probabilities at all"""
    deadline_seconds: float | None = None
    """from submission; None: no limit"""
    public_tokens: int = 0
    """so many from the prompt's beginning are declared to be no secret: the public namespace may serve them"""
    allowance: Allowance = Allowance()
    """its tenant's: what the namespace may hold"""
    priority: int = 0
    """the higher go first, whoever they are from; where there is no room for them, the lowest that runs makes way"""
    expects: Kind = Kind.CHAT
    """what will probably follow the reply"""

    session: str | None = None
    """what its client says that it belongs to: what belongs together is served in one place, where there are several"""
    drawn_tokens: int = 0
    """so many of the last tokens of the prompt are the beginning of this very reply, drawn by another engine"""
    traced: bool = False
    """whether its usage tells the phases"""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's distribution before any sampler touched it."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), most probable first"""


class PhaseKind(StrEnum):
    QUEUE = "queue"
    """until it had a place in the live cache"""
    RESTORE = "restore"
    """KV came back from the store"""
    PREFILL = "prefill"
    """a chunk of its prompt was computed"""
    DECODE = "decode"
    SWAP = "swap"
    """it had given its place up"""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a request's life; seconds from its submission."""

    kind: PhaseKind
    start_seconds: float
    end_seconds: float
    n_tokens: int
    """restored or computed"""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost; seconds are measured from submission."""

    prompt_tokens: int
    cached_tokens: int
    """prompt tokens whose KV was already there (or was being computed for someone else)"""
    completion_tokens: int
    queue_seconds: float = 0.0
    """until its first prompt token was computed"""
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    n_swaps: int = 0
    phases: tuple[Phase, ...] = ()
    """of a request that is `traced`"""


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason
    usage: Usage
    error: PastureError | None = None
    """set exactly when `reason` is ERROR"""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one request: a token, the end, or both."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None
    usage: Usage | None = None
    """with a request's first token: its cost until then, for a reader who ends the request himself at a stop string"""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the KV of a prefix is, in tokens from its beginning."""

    live_tokens: int
    """in the live cache"""
    shared_tokens: int
    """of those, in cells that more than one sequence holds"""
    ram_tokens: int
    """in the store's RAM"""
    slow_tokens: Mapping[str, int] = field(default_factory=dict)
    """in each slow tier, by its name; none where nobody asked them"""


# What the engine is


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of pasture needs to know of a loaded model."""

    name: str
    path: str
    architecture: str
    description: str
    n_params: int
    n_bytes: int
    """of the file, or of all its parts"""
    n_vocab: int
    n_layers: int
    n_ctx_train: int
    cell_bytes: int
    """bytes of KV a token, at the cache's types; 0 for a purely recurrent model"""
    shareable: bool
    """True: any prefix of a sequence can be shared or cut off. False (recurrent, hybrid): only a whole sequence can."""
    slowed_by: tuple[str, ...] = ()
    """what makes it slower on this machine than it could be, a sentence each"""
    weights: Weights = Weights.FILE
    """FILE, or what a quantised file was written out as"""
    loaded_path: str = ""
    """the file that is loaded: `path`, or the copy of it; empty where none is"""
    weights_because: str = ""
    """what the self-check measured, where it chose"""


@dataclass(frozen=True, slots=True)
class PoolShape:
    """The limits of the live cache."""

    n_cells: int
    n_seqs: int
    layout: Layout = Layout.UNIFIED
    n_batch: int = 2048
    """tokens in one step, at most"""
    tile_tokens: int = 1
    """from this many tokens in a step on, attention is computed in tiles, which may be several times cheaper a token"""
    can_pad: bool = False
    """whether the engine can fill up to a tile with rows that nobody reads: a step (unified), or a work (streams)"""
    form: Form = Form.RAW
    """how cells are written now: RAW, in the types the cache was configured with; else shifted down"""
    annex_cells: int = 0
    """of a small cache beside this one, in which prompts can be computed (`Work.in_annex`); 0: there is none"""

    @property
    def cells_per_sequence(self) -> int:
        """The longest conversation in tokens."""
        return self.n_cells if self.layout is Layout.UNIFIED else self.n_cells // self.n_seqs


# One step


@dataclass(frozen=True, slots=True)
class Copy:
    """Target joins source's cells in `[p0, p1)`; metadata only in the unified layout, bytes in streams (then p0 is 0)."""

    source: SeqId
    target: SeqId
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class Remove:
    """The sequence leaves its cells in `[p0, p1)`; a cell that nobody is left in is free. `p1=None`: to the end."""

    sequence: SeqId
    p0: int
    p1: int | None


@dataclass(frozen=True, slots=True)
class Share:
    """Both have computed the same tokens in `[p0, p1)`: target gives its cells back and joins source's. Unified only."""

    source: SeqId
    target: SeqId
    p0: int
    p1: int


class Slab(ABC):
    """KV of consecutive positions `[p0, p1)` outside the live cache. Immutable; engines subclass it."""

    p0: int
    p1: int

    @property
    @abstractmethod
    def n_bytes(self) -> int: ...

    @abstractmethod
    def cut(self, p0: int, p1: int) -> Slab:
        """The part `[p0, p1)`, absolute positions, without copying where possible."""


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the sequence's KV in `[p0, p1)` out of the live cache; the result holds it under `key`."""

    sequence: SeqId
    p0: int
    p1: int
    key: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Write neighbouring slabs into free cells of the sequence, which must hold exactly `[0, slabs[0].p0)` before."""

    sequence: SeqId
    slabs: tuple[Slab, ...]
    """at least one, ascending, each beginning where the one before ends"""


@dataclass(frozen=True, slots=True)
class Compact:
    """Move the sequence's cells in `[p0, p1)`, which nobody else holds, behind everything that is written. Unified only.

    The cells that they leave stay taken until a `Release`: a cache fills its first free cells first, and these lie scattered.
    Nothing happens where an engine has no free room for the move.
    """

    sequence: SeqId
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class Release:
    """Free the cells that were left in a `Compact`."""


CellOperation = Copy | Remove | Share | Save | Restore | Compact | Release


class Direction(StrEnum):
    SAVE = "save"
    RESTORE = "restore"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one operation moved out of the live cache, or into it: the cost gate's food."""

    direction: Direction
    n_tokens: int
    n_bytes: int
    seconds: float


class Sampler:
    """A request's sampling state (penalty window, random generator); engines subclass it. Owned by the engine thread."""

    def close(self) -> None:
        """Free what the engine holds for it; safe to call twice."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one sequence to compute in this step."""

    sequence: SeqId
    tokens: Sequence[int]
    start: int
    """position of tokens[0]"""
    sampler: Sampler | None
    """draws a token after the last of `tokens`; None: the prompt goes on in a later step"""
    n_logprobs: int | None = None
    pad_tokens: int = 0
    """computed behind `tokens` for the shape of the micro-batch, read by nobody and removed again; streams layout only"""
    in_annex: bool = False
    """compute it in the annex, which then holds the whole sequence, and move what is new into the live cache"""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one engine step does: first the operations in order, then every work in one batch."""

    operations: tuple[CellOperation, ...]
    works: tuple[Work, ...]
    n_apart: int = 0
    """so many works, from the first, are a batch of their own that goes before the others; 0: all are one batch

    But for those in the annex: each of them goes alone, last."""
    pad_to: int = 0
    """fill the (last) batch up to this many rows, which take free cells for the length of the step; unified layout only"""

    @property
    def n_tokens(self) -> int:
        return sum(len(work.tokens) for work in self.works)

    @property
    def n_cells(self) -> int:
        """Free cells that it needs; those of rows that only fill the batch up are free again after it."""
        alone = sum(len(work.tokens) for i, work in enumerate(self.works) if i < self.n_apart or work.in_annex)
        return alone + max(self.n_tokens - alone, self.pad_to)


@dataclass(frozen=True, slots=True)
class Sample:
    token: int
    logprobs: TokenLogprobs | None = None
    is_last: bool = False
    """its constraint allows nothing behind it"""


class Outcome(StrEnum):
    DONE = "done"
    NO_ROOM = "no room"
    """operations were carried out, no work was; the sequences are as they were"""
    FAILED = "failed"
    """operations were carried out; every sequence in the works was cut back to its `start` (or is in `lost`)"""
    INTERRUPTED = "interrupted"
    """as FAILED, because somebody asked for it: nothing is wrong"""


@dataclass(frozen=True, slots=True)
class StepResult:
    outcome: Outcome
    samples: Mapping[SeqId, Sample]
    """sequence -> token drawn, for each work with a sampler that could draw one"""
    saved: Mapping[int, Slab]
    """`Save.key` -> slab"""
    decode_seconds: float
    """inside llama_decode"""
    apart_seconds: float = 0.0
    """of decode_seconds, those of the plan's `n_apart` works"""
    annex_seconds: float = 0.0
    """of decode_seconds, those of works in the annex"""
    moving_seconds: float = 0.0
    """of moving their sequences into the annex and out of it"""
    sample_seconds: float = 0.0
    lost: frozenset[SeqId] = frozenset()
    """sequences the engine had to empty (recurrent states cannot be cut back)"""
    transfers: tuple[Transfer, ...] = ()
    """one a Save or Restore, in the order of the operations"""
    refused: Mapping[SeqId, RequestError] = field(default_factory=dict)
    """sequence -> why nothing can be drawn for it: its constraint asks for too much, or a bias bans all that it allows"""


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of cells and everybody in it, for `Engine.rebuild`."""

    holders: tuple[SeqId, ...]
    p0: int
    p1: int
