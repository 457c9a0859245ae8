"""Every message between the processes of a run: tagged msgspec structs in msgpack.

Commands and hellos refuse unknown fields; telemetry ignores them. docs/protocol.md tells the conversation, this module its words.
What comes from every node each second is hidden from the garbage collector (gc=False), which finds nothing in it and would look
through a large fleet's again and again.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

import msgspec

from shards.common.decoding import UNDECODABLE, brief

VERSION = 2
MAX_FRAME = 16 * 1024 * 1024
"""Bytes of the largest frame that is accepted."""

CERTAIN_STATUS = 78
"""Exit status of a rank whose next start would end in the same way: the recipe or the software is wrong."""

State = Literal["building", "starting", "training", "paused", "recovering", "released", "finished", "failed"]
Verb = Literal[
    "pause",
    "release",
    "resume",
    "checkpoint",
    "golden",
    "ungolden",
    "rollback",
    "advance",
    "set",
    "cancel",
    "stop",
    "stop-now",
    "regroup",
    "node-drain",
    "node-add",
    "node-quarantine",
    "acknowledge",
]


class Op(enum.IntEnum):
    """What ranks do at a boundary; the word that rank 0 broadcasts."""

    NONE = 0
    PAUSE = 1
    RESUME = 2
    CHECKPOINT = 3
    ROLLBACK = 4
    ADVANCE = 5
    SET = 6
    STOP = 7
    STOP_NOW = 8
    RELEASE = 9
    REGROUP = 10
    HOLD = 11
    """No command, and without a number: `Hold` is on, and off."""
    UNHOLD = 12


PHASES = ("loading", "training", "evaluating", "sampling", "generating", "scoring", "saving", "paused", "ending")
"""What ranks can be at."""
PHASE_WORDS = {"generating": "writing responses", "scoring": "scoring responses"}
"""What an operator is told of a phase, where its name does not say it."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A message in which an unknown field is an error."""


class _Lenient(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A message in which unknown fields are passed over."""


# The start of a generation: put into its store by the agent, read by every rank.


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """A line of steps none of which was taken twice."""

    id: int
    parent: int | None = None
    fork: str | None = None
    """Checkpoint from which it goes on; None: from the beginning."""
    fork_step: int = 0
    cause: Literal["start", "rollback", "crash"] = "start"
    skip: int = 0
    """Steps of data passed over right after the fork."""
    lr_scale: float = 1.0
    """Factor on the learning rate from the fork on."""
    author: str = ""
    time: float = 0.0


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """A `set` of an earlier generation that is applied again at its step."""

    step: int
    key: str
    value: float


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation of ranks starts from."""

    generation: int
    term: int
    lineage: Lineage
    checkpoint: str | None = None
    """Committed checkpoint to load; None: initialise."""
    skip: int = 0
    """Steps of data to pass over after loading: the lineage's, where `checkpoint` is its fork."""
    lr_scale: float = 1.0
    """Factor on the learning rate to apply after loading, likewise."""
    applied: int = 0
    """Number of the last command that earlier generations applied."""
    replays: tuple[Replay, ...] = ()
    paused: bool = False
    """Hold at the first boundary."""


# Rank 0 to the controller. Each travels in a Numbered frame and is kept until acknowledged.


class RankHello(_Strict, frozen=True):
    version: int
    run: str
    generation: int
    term: int
    pid: int
    world: int
    channel: Literal["control", "telemetry"] = "control"
    """Control and telemetry travel apart and are numbered apart."""


class Metrics(_Lenient, frozen=True):
    """One step's metrics. Droppable when the spool is full."""

    lineage: int
    step: int
    tokens: int
    """Tokens trained on in the whole run, up to and with this step."""
    time: float
    values: dict[str, float]


class Phase(_Lenient, frozen=True):
    """What the ranks are at, sent when it changes."""

    phase: Literal["loading", "training", "evaluating", "sampling", "generating", "scoring", "saving", "paused", "ending"]
    step: int
    stage: str
    stage_step: int
    lineage: int
    settings: dict[str, float] = {}
    """Live settings in force."""
    position: int = 0
    """Samples of the stage's order that were read or passed over."""


class StageBorder(_Lenient, frozen=True):
    """A stage begins or ends."""

    stage: str
    event: Literal["begin", "end"]
    step: int
    stage_step: int
    lineage: int
    product: str | None = None
    """Checkpoint that ends the stage."""


class Outcome(_Lenient, frozen=True):
    """What came of a command, the same on all ranks."""

    number: int
    ok: bool
    step: int
    detail: dict[str, Any] = {}
    reason: str = ""


class CheckpointReady(_Lenient, frozen=True):
    """All ranks have written their part into `directory` below checkpoints/; the controller may commit it."""

    id: str
    directory: str
    digest: str
    """Hash of its manifest file."""
    step: int
    lineage: int
    stage: str
    stage_step: int
    ended: bool
    """It ends its stage."""
    generation: int
    bytes: int
    suspect: bool
    """Its step's metrics were not finite."""
    seconds: float
    """From the boundary until everything was written."""
    stall_seconds: float
    """Of those, the ones in which training stood still."""
    numbers: tuple[int, ...] = ()
    """Commands that this checkpoint answers."""
    loss: float | None = None
    settings: dict[str, float] = {}
    """Live settings that it holds: a rollback to it puts them in force."""


class CheckpointFailed(_Lenient, frozen=True):
    id: str
    step: int
    reason: str
    numbers: tuple[int, ...] = ()


class Sampled(_Lenient, frozen=True):
    """Text that the model wrote. One of a rollout, which has a reward, is droppable when the spool is full."""

    stage: str
    step: int
    lineage: int
    prompt: str
    text: str
    reward: float | None = None
    """Its score, where it has one."""
    kl: float | None = None
    """Log-ratio to the reference, summed over its tokens, in nats."""
    tokens: int | None = None


class Note(_Lenient, frozen=True):
    """Something an operator should see: a warning or an alarm."""

    level: Literal["info", "warning", "alarm"]
    text: str
    step: int


class Ended(_Lenient, frozen=True):
    """The ranks leave by themselves."""

    cause: Literal["finished", "stopped", "stopped-now", "released", "regrouped"]
    step: int
    checkpoint: str | None = None


class Dropped(_Lenient, frozen=True):
    """Telemetry that the spool had no room for."""

    count: int


RankBody = Metrics | Phase | StageBorder | Outcome | CheckpointReady | CheckpointFailed | Sampled | Note | Ended | Dropped


class Numbered(_Lenient, frozen=True):
    """A message that is sent again until acknowledged; `number` counts from 1 within a source."""

    number: int
    body: RankBody


# The controller to rank 0.


class RankWelcome(_Strict, frozen=True):
    term: int
    acknowledged: int
    """Highest number of this source that is stored."""
    hold: bool = False
    """As `Hold`."""


class Hold(_Strict, frozen=True):
    """The ranks wait at the next boundary for as long as it is on: the controller cannot journal what they do."""

    on: bool


class Ack(_Strict, frozen=True):
    number: int


class Order(_Strict, frozen=True):
    """A command for all ranks, at one boundary.

    Arguments by op. ROLLBACK: checkpoint (id), lineage (`Lineage` as builtins), skip, lr_scale. ADVANCE: to (stage name, or
    none for the next). SET: key, value. The others have none.
    """

    number: int
    op: int
    arguments: dict[str, Any] = {}


class Committed(_Strict, frozen=True):
    """The checkpoint is committed under its id."""

    id: str


class CommitRefused(_Strict, frozen=True):
    id: str
    reason: str


# The agent and the controller.


class AgentHello(_Strict, frozen=True):
    version: int
    run: str
    node: str
    pid: int
    generation: int
    """The generation whose ranks it holds; 0: none."""
    address: str = "127.0.0.1"
    """Where the other nodes reach it."""
    probe_port: int = 0
    """A port there that takes connections and closes them: it tells a node that is cut off from one that is slow. 0: none."""


class AgentWelcome(_Strict, frozen=True):
    term: int


class Gather(_Strict, frozen=True):
    """Start the ranks of a generation."""

    start: Start
    node_rank: int
    nodes: int
    ranks_per_node: int
    store_host: str
    store_port: int
    """0: this agent opens the store."""
    environment: dict[str, str] = {}
    """Of the ranks, beside what they inherit."""


class Gathered(_Strict, frozen=True):
    """The store is open and the ranks are starting."""

    generation: int
    store_port: int
    environment: dict[str, str] = {}
    """Of the ranks, the values of secrets left out."""


class Hung(_Strict, frozen=True):
    """Ranks of this node have not moved for longer than they ever should; the agent has written down where they are."""

    generation: int
    phase: str
    seconds: float
    limit: float
    file: str
    """Their stacks, below the run's directory."""
    stuck: tuple[int, ...] = ()
    """Ranks that are stopped or do not answer: the others wait for them."""


class TakeStacks(_Strict, frozen=True):
    """Write down where this node's ranks are: those of another node hang."""

    generation: int


class StacksTaken(_Strict, frozen=True):
    generation: int
    file: str
    stuck: tuple[int, ...] = ()


class EndRanks(_Strict, frozen=True):
    """End the ranks of the generation at once."""

    generation: int
    reason: str


class Leave(_Strict, frozen=True):
    """The agent may end: the run is over."""


class RankExit(msgspec.Struct, frozen=True):
    rank: int
    code: int
    """Exit status; the negative signal where one killed it."""
    message: str = ""


class RanksEnded(_Strict, frozen=True):
    """All ranks of the generation on this node have ended."""

    generation: int
    ok: bool
    exits: tuple[RankExit, ...] = ()
    reason: str = ""
    certain: bool = False
    """Whether the ranks of another start would end in the same way."""


FaultKind = Literal["lost", "xid", "ecc", "remap", "throttle", "nvlink", "pcie", "reset", "hang"]


class Fault(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that is wrong with a GPU."""

    kind: str
    """One of FaultKind; an agent of a later version may know others."""
    text: str
    """In an operator's words."""
    time: float = 0.0
    """When it was first seen, by the node's clock; 0: not known."""


class GpuProcess(msgspec.Struct, frozen=True, array_like=True, gc=False):
    pid: int
    memory: int | None = None
    """Bytes on the GPU."""
    rank: int | None = None
    """Of this run, where it is a rank's or a child's of one."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One GPU's figures; what a card does not give is None."""

    index: int
    name: str = ""
    utilisation: float | None = None
    """Part of the time in which it was busy, 0 to 1; None: not to be had."""
    memory_used: int | None = None
    """Bytes."""
    memory_total: int | None = None
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""
    power_limit: float | None = None
    slowdown: float | None = None
    """Degrees Celsius at which it slows itself down."""
    clock: int | None = None
    """MHz of its multiprocessors."""
    clock_most: int | None = None
    sm: float | None = None
    """Part of the multiprocessors that were busy, 0 to 1; by GPM, from Hopper on."""
    tensor: float | None = None
    """Part of the time in which tensor cores worked, 0 to 1; likewise."""
    links: tuple[int, int] | None = None
    """NVLinks that are up, and all it has; None where it has none."""
    bus: str = ""
    """PCI address, as `nvidia-smi` shows it."""
    faults: tuple[Fault, ...] = ()
    """The gravest first."""
    processes: tuple[GpuProcess, ...] = ()
    stale: float | None = None
    """Since when it has not answered: the figures are from then. By the node's clock; None: they are new."""


class RankBeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far a rank is, as its node sees it."""

    rank: int
    pid: int
    step: int
    time: float
    """When it last passed a boundary, by the node's clock; 0: not yet."""
    phase: str = "loading"
    own: float = 0.0
    """Seconds of a step in which it works and waits for no other rank, smoothed (trainer.control.step_timer); 0: not known."""


class NodeStats(_Lenient, frozen=True, gc=False):
    node: str
    time: float
    cpus: tuple[float, ...]
    """Utilisation of each CPU, 0 to 1."""
    memory_used: int
    memory_total: int
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""
    """Why there are no figures of GPUs, where there are none."""
    rank_rss: tuple[int, ...] = ()
    """Resident bytes of each rank's process."""
    disk_free: int | None = None
    generation: int = 0
    """Of the ranks; 0: there are none."""
    ranks: tuple[RankBeat, ...] = ()


# Screens, the command line and other clients.


class ClientHello(_Strict, frozen=True):
    version: int
    read_only: bool = False
    subscribe: bool = False
    """Send a Snapshot now and whenever something has changed."""


class ClientWelcome(_Strict, frozen=True):
    term: int
    run: str
    directory: str
    author: str
    """Who this client is, as commands will name them."""
    archived: bool = False
    """No controller is running: questions are answered from the run's files, and nothing can be asked to be done."""


class Command(_Strict, frozen=True):
    """What an operator asks for; `id` is the client's and makes a resend harmless."""

    id: str
    verb: Verb
    arguments: dict[str, Any] = {}
    wait: bool = True
    """Answer when it has ended, not already when it is accepted."""


class CommandView(msgspec.Struct, frozen=True, kw_only=True):
    """A command and what has come of it."""

    id: str
    number: int
    verb: str
    arguments: dict[str, Any]
    author: str
    time: float
    state: Literal["queued", "sent", "done", "refused", "failed", "cancelled"]
    step: int | None = None
    detail: dict[str, Any] = {}
    reason: str = ""


class CommandReply(_Strict, frozen=True):
    command: CommandView


class ChartQuery(_Strict, frozen=True):
    """M4 columns of one metric between two steps; the width in dots. `lineage`: None for the line in force."""

    id: int
    metric: str
    start: int
    stop: int
    width: int
    lineage: int | None = None


class ChartReply(_Strict, frozen=True):
    """`columns` as `midwatch.metrics.m4_columns.Columns.encode` makes them."""

    id: int
    columns: bytes


class MetricsQuery(_Strict, frozen=True):
    """Names of all metrics, and rows of some."""

    id: int
    names: tuple[str, ...] = ()
    last: int = 0
    """Newest rows of each."""


class MetricRow(msgspec.Struct, frozen=True, array_like=True):
    lineage: int
    step: int
    tokens: int
    time: float
    value: float


class MetricsReply(_Strict, frozen=True):
    id: int
    names: tuple[str, ...]
    rows: dict[str, tuple[MetricRow, ...]] = {}


class JournalQuery(_Strict, frozen=True):
    """Entries after the given one; the newest `limit` where `after` is negative."""

    id: int
    after: int = -1
    limit: int = 500


class JournalLine(msgspec.Struct, frozen=True, kw_only=True):
    """A journal entry as screens show it."""

    index: int
    time: float
    term: int
    kind: str
    author: str
    text: str
    level: Literal["info", "warning", "alarm"] = "info"


class JournalReply(_Strict, frozen=True):
    id: int
    lines: tuple[JournalLine, ...]


class LogQuery(_Strict, frozen=True):
    """Lines of a log: the newest where `offset` is negative, else from that byte on. Without a `file`: the list of files."""

    id: int
    file: str = ""
    offset: int = -1
    lines: int = 500
    pattern: str = ""
    """Regular expression that lines must match; empty: all."""


class LogReply(_Strict, frozen=True):
    id: int
    files: tuple[str, ...]
    lines: tuple[str, ...] = ()
    offset: int = 0
    """Byte after the last line given; ask from here for what follows."""


class UndoQuery(_Strict, frozen=True):
    """What a rollback to `checkpoint` would undo."""

    id: int
    checkpoint: str
    lr_scale: float = 1.0
    """Factor on the learning rate that would be asked for."""


class UndoReply(_Strict, frozen=True):
    id: int
    checkpoint: str
    step: int
    stage: str
    steps: int
    tokens: int
    seconds: float
    settings: tuple[str, ...] = ()
    """Live settings that it changes, as `lr 0.0003 -> 0.001`."""
    problem: str = ""
    """Why it cannot be done, where it cannot."""


class TextQuery(_Strict, frozen=True):
    """`recipe`: the recipe in force; `samples`: what the model wrote; `batch`: the text read at a step."""

    id: int
    what: Literal["recipe", "samples"]


class TextReply(_Strict, frozen=True):
    id: int
    text: str = ""
    samples: tuple[Sampled, ...] = ()


# The probe: a client asks, the controller passes it on to a process that has the weights, and what that answers back.


class ProbeTurn(msgspec.Struct, frozen=True, array_like=True):
    """What was said before in a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


class ProbeAsk(_Strict, frozen=True):
    """A prompt for one checkpoint, or for two side by side."""

    ask: int
    """The asker's number: what is answered carries it."""
    checkpoints: tuple[str, ...]
    """Ids, steps, `newest` or `golden`."""
    prompt: str
    turns: tuple[tuple[ProbeTurn, ...], ...] = ()
    """For each checkpoint the conversation so far, which a text has none of."""
    form: Literal["auto", "chat", "text"] = "auto"
    """`chat`: by the chat template; `text`: continued as it is, after BOS; `auto`: text of a pretraining checkpoint, else chat."""
    limit: int = 256
    """Tokens of the answer at the most."""
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    alternatives: int = 10
    """Likeliest tokens told beside each one."""


class ProbeStop(_Strict, frozen=True):
    """Ends the answers to an ask where they are; nothing if they have ended."""

    ask: int


class ProbeBegan(_Strict, frozen=True):
    """The checkpoint is loaded and answers."""

    ask: int
    which: int
    """Place of the checkpoint in the ask."""
    checkpoint: str
    """Its id."""
    stage: str
    form: Literal["chat", "text"]
    prompt_tokens: int


class ProbeToken(_Strict, frozen=True):
    ask: int
    which: int
    text: str
    """What it adds to the answer: empty where it ends within a character, which comes with the token that completes it."""
    piece: str
    """The token by itself."""
    log_prob: float
    """At the ask's temperature (at 1 where that is 0), before top_p and top_k; in nats."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Likeliest tokens and their probabilities, the likeliest first; at temperature 1."""


class ProbeEnd(_Strict, frozen=True):
    """There is one for each checkpoint of an ask, whatever happens."""

    ask: int
    which: int
    checkpoint: str
    finish: Literal["stop", "length", "aborted", "failed"]
    text: str = ""
    """The rest of the answer: a character that was never completed."""
    tokens: int = 0
    seconds: float = 0.0
    """Since it began."""
    score: float | None = None
    """The reward model's, of the whole answer; None: there is none."""
    problem: str = ""
    """Why it failed, and the way out."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


ProbeAnswer = ProbeBegan | ProbeToken | ProbeEnd


class SampleQuery(_Strict, frozen=True):
    """What the model wrote: those that match, from the `offset`-th on."""

    id: int
    order: Literal["step", "reward", "worst", "kl", "longest"] = "step"
    """Newest, best, worst, furthest from the reference or longest first; of equals the newest."""
    offset: int = 0
    limit: int = 100
    cut: int = 0
    """Characters of prompt and text that are enough; 0: all."""
    stage: str = ""
    lineage: int | None = None
    start: int = 0
    stop: int | None = None
    """Steps of the run, `stop` not among them."""
    pattern: str = ""
    """Regular expression that prompt or text must match."""
    sample: str = ""
    """Name of the only one that is wanted."""


class SampleView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    stage: str
    step: int
    lineage: int
    on_line: bool = True
    """On the line in force: not undone by a rollback since."""
    reward: float | None = None
    kl: float | None = None
    tokens: int | None = None
    prompt: str = ""
    text: str = ""


class SampleReply(_Strict, frozen=True):
    id: int
    samples: tuple[SampleView, ...] = ()
    total: int = 0
    """That match."""
    stages: tuple[str, ...] = ()
    """That have any."""
    taken: int = 0
    """Samples there have been: another number means that there are new ones."""


# Preferences by hand: a screen asks for pairs, the controller draws them with the probe and keeps what was decided.

Choice = Literal["left", "right", "tie", "both-bad", "skip"]
BEGIN_FIRST = "you annotate nothing here (begin first)"
"""Why a decision is refused of a client that the controller does not know as an annotator, as after a takeover."""


class Share(msgspec.Struct, frozen=True):
    """So many of so many, and where the share lies 19 times in 20; of none, nothing is known."""

    hits: int
    count: int
    low: float | None
    high: float | None


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Between annotators on the pairs that more than one has decided, and of all decisions with the reward model."""

    measure: str
    """Which: Cohen's kappa of two, Krippendorff's alpha of more; empty of fewer."""
    value: float | None
    """1: always, 0: as by chance; None: not to be had."""
    pairs: int
    annotators: int
    alike: Share
    """Pairs on which all said the same."""
    reward: Share
    """Decisions for a side in which the reward model scores that one higher."""
    left: Share
    """Decisions for a side that were for the left one."""
    decisions: dict[str, int]
    """How many stand, by annotator."""


class PreferenceBegin(_Strict, frozen=True):
    """Makes the client an annotator, until it leaves; answered by `PreferenceState`, as all of these are."""

    id: int
    annotator: str
    session: str
    """Made up by the screen: after a lost connection the same one takes its place back."""
    checkpoints: tuple[str, ...] = ()
    """One that answers twice, or two that answer once; none: the newest that writes text."""
    source: str = ""
    """Whose prompts; empty: those of the newest stage's mixture."""
    prompts: tuple[tuple[ProbeTurn, ...], ...] = ()
    """Instead of a source's."""
    shared: float = 0.2
    """Share of the prompts that all annotators get, with the same answers."""
    limit: int = 256
    temperature: float = 0.8


class PreferenceNext(_Strict, frozen=True):
    """Answered when there is a pair, or something to say instead."""

    id: int


class PreferenceMade(_Strict, frozen=True):
    """A decision; answered when it is on disk. Sent again under the same `decision` it is made once."""

    id: int
    decision: str
    pair: str
    choice: Choice
    seconds: float


class PreferenceUndo(_Strict, frozen=True):
    """Takes back the annotator's last decision, and shows its pair again. Sent again under the same `undo` it is done once."""

    id: int
    undo: str


class PreferenceLeave(_Strict, frozen=True):
    """The annotator has gone; what was drawn stays."""

    id: int


class PreferenceQuery(_Strict, frozen=True):
    """How far annotators agree; no annotator is needed for it."""

    id: int


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers; neither where they come from nor their scores, which would sway the annotator."""

    pair: str
    prompt: tuple[ProbeTurn, ...]
    left: str
    right: str
    shared: bool = False


class PreferenceState(_Strict, frozen=True):
    """Where an annotator stands."""

    id: int
    agreement: Agreement
    annotator: str = ""
    pair: PreferencePair | None = None
    """To decide next."""
    today: int = 0
    """Decisions that stand, since midnight where the controller is."""
    total: int = 0
    seconds: float | None = None
    """Median of the last decisions."""
    left: int = 0
    """Prompts that may follow."""
    note: str = ""
    """Something the annotator should know: a file that was repaired, why no pair comes."""
    over: bool = False
    """Every prompt is decided."""


class Refused(_Strict, frozen=True):
    """The request cannot be met. `id` is the request's, where it had one."""

    reason: str
    id: int = 0


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    objective: str
    """`data` for the building of tokenizer and shards."""
    state: Literal["waiting", "running", "done", "cut short", "failed"]
    step: int
    steps: int
    """Of optimizer updates; of percent for the data."""
    context: int = 0
    global_batch: int = 0
    mixture: dict[str, float] = {}
    lr: float = 0.0
    seconds: float = 0.0
    """Spent in it so far."""
    seconds_left: float | None = None
    tokens: int = 0
    product: str | None = None
    origin: str | None = None
    """Checkpoint it began from; of the first stage the `hf:DIR` of the model."""
    note: str = ""
    """What is being done, for the data."""
    losses: dict[str, tuple[float, float]] = {}
    """Held-out loss of each source at the stage's beginning and at its latest evaluation."""
    updates: int = 0
    """Of each rollout; 0: it draws none."""
    kl_target: float | None = None
    """Summed KL of a response that the coefficient is steered to."""


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    step: int
    lineage: int
    stage: str
    stage_step: int
    ended: bool
    time: float
    bytes: int
    golden: bool = False
    suspect: bool = False
    on_line: bool = True
    """On the line in force: not undone by a rollback since."""
    loss: float | None = None
    missing: bool = False
    """Its directory is out of sight; it is used again when it comes back."""
    doubt: str = ""
    """Why an operator should not trust it: an alarm before its step, damage, or metrics that nobody knows."""
    settings: dict[str, float] = {}
    """Live settings that it holds; empty: not known."""


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """An alarm and its repeats, until somebody acknowledges it."""

    key: str
    """What `acknowledge` names it by."""
    text: str
    """Of the newest repeat."""
    rule: str = ""
    """Watch rule that raised it; empty: none did."""
    value: float | None = None
    """Of the rule's metric, at the newest repeat."""
    threshold: str = ""
    """What the rule compares it with, as `above 4`."""
    step: int | None = None
    """Of the first one on the line in force; None: it concerns no step."""
    lineage: int = 0
    time: float
    """Of the first one, likewise."""
    last_step: int | None = None
    last_time: float
    count: int = 1
    acknowledged: bool = False
    acknowledged_by: str = ""


class Straggler(msgspec.Struct, frozen=True, array_like=True):
    """A rank that has been slower than the others for some time."""

    rank: int
    node: str
    own: float
    """Seconds of its own a step."""
    median: float
    """Of all ranks."""
    since: float


class NodeView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    state: Literal["up", "out of reach", "gone", "starting", "spare", "drained", "quarantined"]
    ranks: int
    """Its ranks in the living generation."""
    stats: NodeStats | None = None
    first_rank: int = 0
    failures: int = 0
    """Counted against it since it was last added."""
    note: str = ""
    """Why it is not in use, where that needs saying."""


class Snapshot(_Lenient, frozen=True, kw_only=True):
    """All that a screen shows but series, logs and the journal's past."""

    run: str
    directory: str
    state: State
    reason: str = ""
    """Why it is in that state, where that needs saying."""
    phase: str = ""
    time: float
    started: float
    term: int
    generation: int
    lineage: int
    world: int = 0
    step: int
    """Last step reported."""
    total_steps: int
    tokens: int = 0
    stage: str = ""
    seconds_left: float | None = None
    stages: tuple[StageView, ...] = ()
    lineages: tuple[Lineage, ...] = ()
    checkpoints: tuple[CheckpointView, ...] = ()
    commands: tuple[CommandView, ...] = ()
    """Those not yet ended and the last few that have."""
    nodes: tuple[NodeView, ...] = ()
    latest: dict[str, float] = {}
    """Newest value of each metric."""
    settings: dict[str, float] = {}
    """Live settings in force."""
    settings_asked: dict[str, float] = {}
    """Those asked for since and not in force, after a rollback."""
    events: tuple[JournalLine, ...] = ()
    """Newest entries of the journal."""
    changes: tuple[str, ...] = ()
    """What changed in the environment since the last start."""
    dropped: int = 0
    refused_peers: int = 0
    """Connections that were turned away in this term: of strangers, or of peers that made no sense."""
    stragglers: tuple[Straggler, ...] = ()
    samples: int = 0
    """There have been so many: another number means that there are new ones."""
    phase_since: float = 0.0
    """When the ranks went over to their phase."""
    faults: tuple[str, ...] = ()
    """What stands in the controller's own way until it is put right: a journal that cannot be written, storage that is away."""
    archived: bool = False
    """No controller is running: this is what the run's files say."""
    undone: str = ""
    """The checkpoint that `rollback undone` goes back to; empty: there is none."""
    left_at: dict[int, int] = {}
    """Last step of each lineage that is not in force."""
    heard: float = 0.0
    """When the ranks last reported anything; 0: not yet in this term."""
    step_seconds: float | None = None
    """Of a usual step."""
    alarms: tuple[Alarm, ...] = ()
    """Those that nobody has acknowledged, the newest first."""


Message = (
    RankHello
    | Numbered
    | RankWelcome
    | Ack
    | Order
    | Committed
    | CommitRefused
    | Hold
    | AgentHello
    | AgentWelcome
    | Gather
    | Gathered
    | Hung
    | TakeStacks
    | StacksTaken
    | EndRanks
    | Leave
    | RanksEnded
    | NodeStats
    | ClientHello
    | ClientWelcome
    | Command
    | CommandReply
    | ChartQuery
    | ChartReply
    | MetricsQuery
    | MetricsReply
    | JournalQuery
    | JournalReply
    | LogQuery
    | LogReply
    | UndoQuery
    | UndoReply
    | TextQuery
    | TextReply
    | ProbeAsk
    | ProbeStop
    | ProbeBegan
    | ProbeToken
    | ProbeEnd
    | SampleQuery
    | SampleReply
    | PreferenceBegin
    | PreferenceNext
    | PreferenceMade
    | PreferenceUndo
    | PreferenceLeave
    | PreferenceQuery
    | PreferenceState
    | Refused
    | Snapshot
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class ProtocolError(Exception):
    """A frame is no message of this protocol."""


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(frame: bytes | str) -> Message:
    """Raises ProtocolError for anything that is not a message of this version."""
    if isinstance(frame, str):
        raise ProtocolError("a text frame where a binary one was expected")
    try:
        return _decoder.decode(frame)
    except UNDECODABLE as error:
        raise ProtocolError(brief(error)) from None


LENGTH_BYTES = 4
"""Of the length that stands before each message in a pipe, big-endian."""


def framed(message: Message) -> bytes:
    """For a pipe, which unlike WebSocket keeps no message apart from the next."""
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def frame_length(head: bytes) -> int:
    """Bytes of the message that follows. Raises ProtocolError where they are too many."""
    length = int.from_bytes(head, "big")
    if length > MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes, {MAX_FRAME} are allowed")
    return length
