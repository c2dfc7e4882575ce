"""Runs a server: its sockets, its signals, and how it ends.

Knows uvicorn and the application. It must not know endpoints. SIGTERM or Ctrl-C: nobody new is let in, those in
flight finish within the drain time, the status is 0; a second one ends at once. If the engine cannot be made or kept,
the status is 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from ridgeline.core.errors import RidgelineError
from ridgeline.server.answers import sweep
from ridgeline.server.application import application
from ridgeline.server.edge import JsonLines
from ridgeline.server.errors import engine_restarted
from ridgeline.server.protocol import LimitedProtocol
from ridgeline.server.settings import ServerSettings
from ridgeline.server.state import State

logger = logging.getLogger("ridgeline.server")
LONGEST_FAREWELL_S = 2.0
SEND_BUFFER_BYTES = 256 * 1024
"""What the system may hold of an answer that nobody reads; left to itself, it would be megabytes a stream."""


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: it would close the doors before anyone could be told."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(settings: ServerSettings) -> socket.socket:
    """The one listening socket. RidgelineError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named TCP: asyncio turns off delays of small writes only where the protocol is not left open.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # connections inherit it
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise RidgelineError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    listener.set_inheritable(False)
    return listener


def log_to_stderr(level: str) -> None:
    """JSON lines; a broken pipe or a full disk never stops the server."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ridgeline").setLevel(level.upper())


async def _run(settings: ServerSettings, listener: socket.socket) -> str | None:
    """Serve until told to end; the reason if the engine was given up."""
    state = State(settings)
    state.supervisor.start()
    protocol = type("Protocol", (LimitedProtocol,), {"limits": settings})
    config = uvicorn.Config(
        application(state),
        http=protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(settings.keep_alive_s),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_graceful_shutdown=LONGEST_FAREWELL_S,  # type: ignore[arg-type]
        backlog=2048,
    )
    server = _Server(config)
    asked = asyncio.Event()
    signals = 0

    def told() -> None:
        nonlocal signals
        signals += 1
        asked.set()
        if signals > 1:
            server.force_exit = server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told)
    sweeper = asyncio.create_task(sweep(state))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    logger.info("listening", extra={"fields": {"host": host, "port": port}})
    ends = [asyncio.create_task(asked.wait()), asyncio.create_task(state.supervisor.ended.wait()), serving]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    if asked.is_set():
        logger.info("draining", extra={"fields": {"seconds": settings.drain_timeout_s}})
        drained = asyncio.create_task(state.drain())
        while not drained.done() and signals < 2:
            await asyncio.sleep(0.05)
        drained.cancel()
    else:
        state.admission.empty(engine_restarted())
        await asyncio.sleep(0.1)  # those in flight are told why
    server.should_exit = True
    await asyncio.gather(serving, return_exceptions=True)
    sweeper.cancel()
    for end in ends:
        end.cancel()
    await state.close()
    return state.supervisor.reason if state.supervisor.reason else None


def serve(settings: ServerSettings) -> int:
    """Serve; returns the exit status. Raises RidgelineError if nothing could be begun."""
    log_to_stderr(settings.log_level)
    listener = bound(settings)
    reason = asyncio.run(_run(settings, listener))
    if reason is not None:
        raise RidgelineError(reason)
    return 0
