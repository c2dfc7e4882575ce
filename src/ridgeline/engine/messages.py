"""What an engine in a process of its own and its owner say to each other, and how it travels.

Knows frames: four bytes of length, then a JSON array of the message's number and its fields, in order. A message
has a fixed schema, its dataclass; what does not fit it is a ChannelError, and nothing that arrives is ever
executed. It must not know HTTP, text or devices, and imports nothing heavy: both sides read this file.

Requests go by numbers that the owner chose. Times are of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ridgeline.core.errors import RidgelineError

MOST_FRAME_BYTES = 64 << 20
"""A larger frame ends the conversation: nobody allocates what a length field asks for."""
MOST_UNSENT_BYTES = 256 << 20
_LENGTH = struct.Struct("!I")
_CHUNK = 1 << 20


class ChannelError(RidgelineError):
    """The other side is gone, or does not speak these messages."""


@dataclass(frozen=True, slots=True)
class Start:
    """The first word: make an engine. settings: of EngineConfig. beat_s: say something at least this often.

    faults: obey Fault, which only tests and soaks ask for. roofs: as an earlier engine of this owner found them;
    without any they are found again.
    """

    settings: dict[str, Any]
    beat_s: float = 0.25
    faults: bool = False
    roofs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Submit:
    """A prompt and its samples, one number and one seed each; the first leads, the others share its prompt.

    params: SamplingParams that differ from their defaults. grammar: "" for none, else what `text.grammar` compiles.
    """

    numbers: list[int]
    seeds: list[int]
    ids: list[int]
    params: dict[str, Any]
    max_tokens: int
    eos_ids: list[int]
    bad_word_ids: list[list[int]]
    priority: int
    salt: str
    arrival_s: float
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class Abort:
    """These requests are not wanted any more; there is no answer."""

    numbers: list[int]


@dataclass(frozen=True, slots=True)
class Finish:
    """A stop string ended this request at its output token `at_token`; there is no answer."""

    number: int
    at_token: int
    stop: str


@dataclass(frozen=True, slots=True)
class Fault:
    """Go wrong on purpose (see engine/faults.py); obeyed only if Start allowed it."""

    kind: str
    value: int = 0


@dataclass(frozen=True, slots=True)
class Stop:
    """Give all memory back and end."""


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the start is."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine runs. Facts that intake and metrics need; settings: as resolved; memory: the ledger, in bytes.

    lines: what was decided and why, for a log. load_s: how long the start took. roofs: of the machine, as
    matrix_flops, vector_flops, bytes_per_s and source; empty if nobody knows them. floors: least seconds of steps, as
    Forecast.floors has them; empty without roofs.
    """

    directory: str
    vocabulary: int
    eos_ids: list[int]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    block_size: int
    num_blocks: int
    seed: int
    settings: dict[str, Any]
    memory: dict[str, Any]
    lines: list[str]
    load_s: float
    roofs: dict[str, Any] = field(default_factory=dict)
    floors: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine cannot be made, for a reason that another try would not change."""

    message: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """What steps brought, and where the engine stands. Columns of equal length beat a list of objects.

    numbers, tokens: each new token and whose it is. firsts: (number, first scheduled, cached tokens) of requests
    heard of for the first time. scores: (number, log-probability, rank, [(id, log-probability), …]) of those
    tokens whose owners asked. prompts: (number, [(id, log-probability, rank, [...]), …]) of prompt tokens.
    ended: (number, reason, stop id or None, preemptions).
    step_s: how long the step took; device_s: the device's part of it. flops, bytes: the least that it had to do;
    floor_s: the least time of that under the machine's roofs. 0 and None if nobody counts. sampled, drafted, accepted,
    draft_s: as a StepRecord has them; depths: accepted nodes of each tree; tree: now and then one of the trees, as
    [token before it], tokens, parents and accepted nodes.
    """

    step: int
    numbers: list[int]
    tokens: list[int]
    firsts: list[list[Any]]
    scores: list[list[Any]]
    prompts: list[list[Any]]
    ended: list[list[Any]]
    kind: str
    new_tokens: int
    step_s: float
    device_s: float
    predicted_s: float | None
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    flops: float = 0.0
    bytes: float = 0.0
    floor_s: float | None = None
    sampled: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_s: float = 0.0
    depths: list[int] = field(default_factory=list)
    tree: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Failed:
    """This request ended because the engine could not go on with it; code: as in docs/serving.md."""

    number: int
    code: str


@dataclass(frozen=True, slots=True)
class Beat:
    """The loop goes round. steps: run so far; referenced_blocks: held by requests; requests: known to the engine."""

    steps: int
    requests: int
    free_blocks: int
    referenced_blocks: int


Message = (
    Start | Submit | Abort | Finish | Fault | Stop
    | Loading | Ready | Refused | Stepped | Failed | Beat
)  # fmt: skip

_KINDS: tuple[type[Any], ...] = get_args(Message)
_NUMBERS = {kind: number for number, kind in enumerate(_KINDS)}
_Check = Callable[[Any], bool]


def _check(hint: Any) -> _Check:
    """Whether a JSON value is of a type."""
    origin = get_origin(hint)
    if hint is Any:
        return lambda value: True
    if origin in (Union, UnionType):
        checks = [_check(one) for one in get_args(hint)]
        return lambda value: any(check(value) for check in checks)
    if origin is list:
        inner = get_args(hint)[0]
        if inner in (int, str):
            return lambda value: type(value) is list and all(type(one) is inner for one in value)
        item = _check(inner)
        return lambda value: type(value) is list and all(item(one) for one in value)
    if origin is dict:
        return lambda value: type(value) is dict
    if hint is float:
        return lambda value: type(value) in (float, int)
    assert hint in (int, str, bool, NoneType), hint
    return lambda value: type(value) is hint


_NAMES = {kind: [one.name for one in fields(kind)] for kind in _KINDS}
_CHECKS = {kind: [_check(get_type_hints(kind)[name]) for name in _NAMES[kind]] for kind in _KINDS}


def encode(message: Message) -> bytes:
    """A message as a frame. ChannelError if it is larger than a frame may be."""
    kind = type(message)
    values = [_NUMBERS[kind], *(getattr(message, name) for name in _NAMES[kind])]
    body = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    if len(body) > MOST_FRAME_BYTES:
        raise ChannelError(f"{kind.__name__}: {len(body)} bytes are more than a frame's {MOST_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | bytearray | memoryview) -> Message:
    """The message of a frame without its length. ChannelError for anything that is none."""
    try:
        values = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise ChannelError("a frame that is no JSON") from None
    if type(values) is not list or not values or type(values[0]) is not int or not 0 <= values[0] < len(_KINDS):
        raise ChannelError("a frame that is no message")
    kind = _KINDS[values[0]]
    checks = _CHECKS[kind]
    if len(values) != len(checks) + 1:
        raise ChannelError(f"{kind.__name__} has {len(checks)} fields, got {len(values) - 1}")
    for name, check, value in zip(_NAMES[kind], checks, values[1:]):
        if not check(value):
            raise ChannelError(f"{kind.__name__}.{name}: {value!s:.60}")
    message: Message = kind(*values[1:])
    return message


class Frames:
    """Bytes as they come, cut into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def push(self, data: bytes) -> Iterator[Message]:
        """Messages that `data` completes. ChannelError for a frame that is too large."""
        self._held += data
        place = 0
        try:
            while len(self._held) - place >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._held, place)
                if length > MOST_FRAME_BYTES:
                    raise ChannelError(f"a frame of {length} bytes; {MOST_FRAME_BYTES} are allowed")
                end = place + _LENGTH.size + length
                if len(self._held) < end:
                    break
                body = bytes(self._held[place + _LENGTH.size : end])
                place = end
                yield decode(body)
        finally:
            del self._held[:place]


class Channel:
    """One end, for a loop that must never wait for the other: sending keeps what the socket does not take yet."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._frames = Frames()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)

    def send(self, message: Message) -> None:
        """ChannelError if the other side is gone, or has not read for far too long."""
        self._unsent += encode(message)
        self._flush()
        if len(self._unsent) > MOST_UNSENT_BYTES:
            raise ChannelError("the other side does not read")

    def receive(self, timeout_s: float) -> list[Message]:
        """What has come; waits at most `timeout_s` if nothing has. ChannelError if the other side is gone."""
        if self._unsent:
            self._flush()
        self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if not self._poll.poll(timeout_s * 1e3):
            return []
        messages: list[Message] = []
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise ChannelError(f"the other side is gone ({error.strerror})") from None
            if not data:
                raise ChannelError("the other side is gone")
            messages.extend(self._frames.push(data))
            if len(data) < _CHUNK:
                break
        if self._unsent:
            self._flush()
        return messages

    def close(self) -> None:
        """Say no more. What was not taken yet is given a moment."""
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLOUT)
        for _ in range(10):
            if not self._unsent or not self._poll.poll(100):
                break
            try:
                self._flush()
            except ChannelError:
                break
        self._socket.close()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[:_CHUNK])
                del self._unsent[:sent]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise ChannelError(f"the other side is gone ({error.strerror})") from None
