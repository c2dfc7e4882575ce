"""Machines: rates and sizes of the whole memory hierarchy and of both compute roofs, each figure with its source.

Knows hardware.toml and the user's file of the same form. It must not know models or ops; what a cost takes on
a machine is roofline.py's work.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ridgeline.core.errors import InvalidArgument

THIS = "this"
BUILT_IN = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Hardware:
    """One device. Units are in the names; links count one direction; None where nobody knows.

    matrix: FLOP/s of the matrix units by dtype name, dense, fp32 accumulation. vector_flops: fp32 FLOP/s of the
    other units. clock_hz: at which those hold. sms: multiprocessors (compute units, cores).
    device: its type as torch names it. source: where the figures come from, by group.
    """

    id: str
    name: str
    matrix: Mapping[str, float]
    vector_flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    sms: int
    clock_hz: float | None = None
    exps_per_sm_clock: float | None = None
    l2_bytes: float | None = None
    l2_bytes_per_s: float | None = None
    sram_bytes_per_sm: float | None = None
    sram_bytes_per_sm_clock: float | None = None
    host_link_bytes_per_s: float | None = None
    device_link_bytes_per_s: float | None = None
    watts: float | None = None
    price_per_hour: float | None = None
    device: str = "cuda"
    source: Mapping[str, str] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """Dense FLOP/s of the matrix units; InvalidArgument if they do not compute in `dtype`."""
        if dtype not in self.matrix:
            known = ", ".join(sorted(self.matrix))
            raise InvalidArgument("dtype", f"{self.name} has no matrix rate for {dtype}; it has {known}")
        return self.matrix[dtype]

    def balance(self, dtype: str) -> float:
        """FLOP per byte at which compute and memory take the same time: the ridge."""
        return self.flops(dtype) / self.memory_bytes_per_s

    @property
    def exps_per_s(self) -> float | None:
        """Exponentials per second (special-function units)."""
        if self.exps_per_sm_clock is None or self.clock_hz is None:
            return None
        return self.exps_per_sm_clock * self.sms * self.clock_hz

    @property
    def sram_bytes(self) -> float | None:
        """Shared memory of all multiprocessors together."""
        return None if self.sram_bytes_per_sm is None else self.sram_bytes_per_sm * self.sms

    @property
    def sram_bytes_per_s(self) -> float | None:
        if self.sram_bytes_per_sm_clock is None or self.clock_hz is None:
            return None
        return self.sram_bytes_per_sm_clock * self.sms * self.clock_hz

    def with_memory(self, bytes_per_s: float, memory_bytes: float | None = None) -> Hardware:
        """The same device with another memory."""
        return replace(
            self,
            memory_bytes_per_s=bytes_per_s,
            memory_bytes=self.memory_bytes if memory_bytes is None else memory_bytes,
        )


def user_file() -> Path:
    """The user's own table; it need not exist."""
    named = os.environ.get("RIDGELINE_HARDWARE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ridgeline" / "hardware.toml"


def known() -> dict[str, Hardware]:
    """Every machine by id: the built-in ones, changed and joined by the user's.

    Raises InvalidArgument if the user's file cannot be read, or says something that no machine has.
    """
    machines = dict(_built_in())
    path = user_file()
    if not path.is_file():
        if os.environ.get("RIDGELINE_HARDWARE"):
            raise InvalidArgument("RIDGELINE_HARDWARE", f"{path} is not a file")
        return machines
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument("hardware", f"cannot read {path}: {error}") from error
    for name, values in tables.items():
        machines[name.lower()] = _machine(name.lower(), values, machines.get(name.lower()), str(path))
    return machines


def find(name: str) -> Hardware:
    """The machine of that id, in any case. "this" is not in the table: it is measured.

    Raises InvalidArgument with the ids that are known and the nearest of them.
    """
    machines = known()
    wanted = name.strip().lower()
    if wanted in machines:
        return machines[wanted]
    plain = {_plain(one): one for one in machines}
    if _plain(wanted) in plain:
        return machines[plain[_plain(wanted)]]
    near = [one for one in machines if wanted and one.startswith(wanted)]
    near = near or difflib.get_close_matches(wanted, [*machines, THIS], n=1, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InvalidArgument("hardware", f"{name!r} is not known: {', '.join([*machines, THIS])}{hint}")


def named(name: str) -> Hardware | None:
    """The table's machine of a driver's name, such as "NVIDIA A100-SXM4-80GB": of the same chip, and then the one whose
    name shares most with it."""
    words = name.replace("-", " ").split()

    def chip(machine: Hardware) -> str:
        return next((word for word in machine.name.split() if any(map(str.isdigit, word))), machine.name)

    same = [one for one in known().values() if chip(one) in words]
    return max(same, key=lambda one: sum(word in name for word in one.name.split()), default=None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


@cache
def _built_in() -> Mapping[str, Hardware]:
    tables = tomllib.loads(BUILT_IN.read_text(encoding="utf-8"))
    return {name: _machine(name, values, None, BUILT_IN.name) for name, values in tables.items()}


_NAMES = {one.name for one in fields(Hardware)} - {"id"}
_NUMBERS = _NAMES - {"name", "matrix", "device", "source"}


def _machine(name: str, values: Any, known: Hardware | None, origin: str) -> Hardware:
    """A table of the file as a machine; of a known one it may say only what differs."""
    if not isinstance(values, dict):
        raise InvalidArgument("hardware", f"{origin}: {name} must be a table of figures")
    for key, value in values.items():
        if key not in _NAMES:
            raise InvalidArgument("hardware", f"{origin}: [{name}] has no field {key!r}; fields are {_listed(_NAMES)}")
        numbers = value if key == "matrix" else {key: value} if key in _NUMBERS else {}
        for what, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
                raise InvalidArgument("hardware", f"{origin}: [{name}] {what} must be a number above 0, not {number!r}")
    if known is not None:
        matrix = {**known.matrix, **values.get("matrix", {})}
        source = {**known.source, "changed": origin, **values.get("source", {})}
        return replace(known, **{**values, "matrix": matrix, "source": source})
    missing = [one for one in ("name", "matrix", "memory_bytes", "memory_bytes_per_s", "sms") if one not in values]
    if missing:
        raise InvalidArgument("hardware", f"{origin}: [{name}] lacks {', '.join(missing)}")
    slowest = min(values["matrix"].values())
    return Hardware(id=name, **{"vector_flops": slowest, **values})


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
