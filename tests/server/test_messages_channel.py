"""The engine's messages: what is said arrives, and nothing else does."""

from __future__ import annotations

import json
import socket
import struct

import pytest

from ridgeline.engine import messages as spoken
from ridgeline.engine.messages import Abort, Beat, Channel, ChannelError, Finish, Frames, Submit, decode, encode

SUBMIT = Submit([1, 2], [5, -6], [1, 2, 3], {"temperature": 0.5}, 4, [0], [[1, 2]], 0, "", 1.5)


@pytest.mark.parametrize("message", [SUBMIT, Abort([3]), Finish(1, 2, "stop\u2028"), Beat(1, 2, 3, 4)])
def test_round_trip(message: spoken.Message) -> None:
    assert decode(encode(message)[4:]) == message


def test_frames_may_be_cut_anywhere() -> None:
    whole = b"".join(map(encode, (SUBMIT, Abort([1]), Finish(1, 2, "x"))))
    for size in (1, 3, 7, len(whole)):
        frames = Frames()
        found = [one for at in range(0, len(whole), size) for one in frames.push(whole[at : at + size])]
        assert found == [SUBMIT, Abort([1]), Finish(1, 2, "x")]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"[99]", b'["1"]', b"[2]", b"[2,[1],3]", b'[2,["1"]]', b"[2,[true]]", b"[2,[1.0]]",
        b"[3,1,2,3]", b"\x80\x04.", b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_fits_no_schema_is_refused(body: bytes) -> None:
    with pytest.raises(ChannelError):
        decode(body)


def test_a_large_frame_is_not_waited_for() -> None:
    with pytest.raises(ChannelError):
        list(Frames().push(struct.pack("!I", spoken.MOST_FRAME_BYTES + 1)))


def test_numbers_that_json_has_not_are_not_sent() -> None:
    with pytest.raises(ValueError):
        encode(Submit([1], [1], [1], {"temperature": float("nan")}, 1, [], [], 0, "", 0.0))


def test_a_channel_keeps_what_the_other_does_not_take() -> None:
    ours, theirs = socket.socketpair()
    channel, other = Channel(ours), Channel(theirs)
    large = Submit([1], [1], list(range(200_000)), {}, 1, [], [], 0, "", 0.0)
    for _ in range(3):
        channel.send(large)
    received: list[spoken.Message] = []
    while len(received) < 3:
        received += other.receive(0.1)
        channel.receive(0.0)
    assert received == [large] * 3
    other.close()
    with pytest.raises(ChannelError):
        channel.receive(1.0)


def test_no_message_is_anything_but_json() -> None:
    assert json.loads(encode(SUBMIT)[4:])[1] == [1, 2]
