"""Checks schemas in a child process that is killed when one takes too long.

Knows the child's lines (text/grammar_child.py). It must not know llguidance: this process never compiles a grammar.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict

from ridgeline.server.errors import ApiError, invalid, short_message
from ridgeline.server.settings import ServerSettings

MOST_KEPT = 256
START_S = 20.0


class GrammarChecker:
    """One child, started when first needed; verdicts of the most recent schemas are kept."""

    def __init__(self, directory: str, width: int, settings: ServerSettings) -> None:
        self._arguments = (directory, str(width), str(settings.grammar_memory_bytes))
        self._settings = settings
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._verdicts: OrderedDict[str, tuple[str, bool] | None] = OrderedDict()

    async def check(self, schema: str, param: str = "response_format") -> None:
        """ApiError 400: the schema is too large, invalid, or too complex."""
        if len(schema) > self._settings.max_schema_bytes:
            most = self._settings.max_schema_bytes
            raise invalid(param, f"{param}: the schema is larger than {most} bytes", "grammar_too_complex")
        if schema in self._verdicts:
            self._verdicts.move_to_end(schema)
            verdict = self._verdicts[schema]
        else:
            async with self._turn:
                verdict = await self._ask(schema)
            self._verdicts[schema] = verdict
            if len(self._verdicts) > MOST_KEPT:
                self._verdicts.popitem(last=False)
        if verdict is not None:
            message, is_complex = verdict
            code = "grammar_too_complex" if is_complex else None
            raise invalid(param, short_message(f"{param}: {message}"), code)

    async def _ask(self, schema: str) -> tuple[str, bool] | None:
        line = json.dumps({"schema": schema}).encode() + b"\n"
        for attempt in (0, 1):  # an idle child may have died
            child = await self._ready_child()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write(line)
                await child.stdin.drain()
                raw = await asyncio.wait_for(child.stdout.readline(), self._settings.grammar_timeout_s)
                answer = json.loads(raw)
            except TimeoutError:
                self.close()
                return "the schema takes too long to compile", True
            except (OSError, ValueError):
                self.close()
                if attempt:
                    return "the schema cannot be compiled within its limits", True
                continue
            except asyncio.CancelledError:
                self.close()  # its answer would be taken for the next one's
                raise
            return (answer["error"], answer["complex"]) if "error" in answer else None
        raise AssertionError("unreachable")

    async def _ready_child(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "ridgeline.text.grammar_child",
                *self._arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=1 << 20,
            )
            self._child = child
            assert child.stdout is not None
            try:
                greeting = await asyncio.wait_for(child.stdout.readline(), START_S)
            except TimeoutError:
                greeting = b""
            if not greeting:
                self.close()
                raise ApiError(503, "grammars cannot be checked now", None, "unavailable", 1)
        return self._child

    def close(self) -> None:
        """Kill the child."""
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
