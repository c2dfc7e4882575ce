"""Tables of tiles, stages and splits: which of a kernel's variants is fastest on which device.

Knows names, keys and files. It must not know kernels: a kernel's module declares its tables here as Tunable, with
the defaults that its author found, and looks its tile up in its own dictionary. `settle` overwrites entries of
those dictionaries, once, when kernels are loaded: first with the table that ships for this very device (a JSON file
beside this one), then with what `ridgeline kernels tune` kept on this machine. A table decides speed and never
results.

A kept table says which choices there were when it was made (its edition). If a kernel offers others by now, that part
of the table is passed over, which `settle` reports; the tests hold the shipped tables to the present editions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ridgeline.core.errors import RidgelineError
from ridgeline.kernels import kept

FOLDER = Path(__file__).parent
WORKS = ("prefill", "short", "decode")
"""What a table is tried on: long prompts, many short ones, single tokens over long contexts."""


class Shape(NamedTuple):
    """What an entry of a table is for. item_bytes: of an element; None: any."""

    head_dim: int | None
    item_bytes: int | None


def _anything(key: Any, entry: Any) -> bool:
    return True


@dataclass(frozen=True)
class Tunable:
    """One table of a kernel of `attention`.

    kernel: the kernel's name. name: of the table. table: the module's own dictionary, whose entries are named
    tuples or frozen dataclasses; it is changed in place. axes: fields of an entry -> the values that may be tried;
    other fields stay.
    exists(key, entry): whether the kernel can be compiled so (shared memory, registers, divisibility).
    shape(key): what an entry is for. work: one of WORKS. lengths: of the prompts (contexts in decode) that it is
    tried on, instead of the work's own. Making one enters it in TUNABLES.
    """

    kernel: str
    name: str
    table: MutableMapping[Any, Any]
    axes: Mapping[str, Sequence[Any]]
    shape: Callable[[Any], Shape]
    work: str
    exists: Callable[[Any, Any], bool] = _anything
    lengths: Sequence[int] = ()
    defaults: Mapping[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        assert self.work in WORKS, self.work
        assert self.id not in TUNABLES, f"there is a table {self.id} already"
        for key, entry in self.table.items():
            assert set(self.axes) <= set(values_of(entry)), (self.id, key)
        object.__setattr__(self, "defaults", dict(self.table))
        TUNABLES[self.id] = self

    @property
    def id(self) -> str:
        return f"{self.kernel}/{self.name}"

    @property
    def edition(self) -> str:
        """A digest of what may be chosen: fields, axes and keys."""
        fields = tuple(values_of(next(iter(self.defaults.values()))))
        axes = sorted((name, list(values)) for name, values in self.axes.items())
        keys = sorted(map(key_text, self.defaults))
        return hashlib.sha256(repr((fields, axes, keys)).encode()).hexdigest()[:12]

    def candidates(self, key: Any) -> Iterator[Any]:
        """Every entry that the axes allow for a key and that exists; the present one first."""
        present = self.table[key]
        yield present
        for values in itertools.product(*self.axes.values()):
            entry = changed(present, dict(zip(self.axes, values)))
            if entry != present and self.exists(key, entry):
                yield entry


TUNABLES: dict[str, Tunable] = {}
"""Every table of the kernels that have been loaded, by id ("triton/long")."""


@dataclass(frozen=True)
class Settled:
    """What `settle` did: ids of tables -> the file that an entry came from; ids passed over -> why."""

    device: str
    taken: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)


def slug(device: str) -> str:
    """A device's name as a file's: "NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")


def shipped_file(device: str) -> Path:
    return FOLDER / f"{slug(device)}.json"


def kept_file(device: str) -> Path:
    """Where `ridgeline kernels tune` keeps its table: below RIDGELINE_CACHE, else in the user's cache."""
    *_, place = kept.places(FOLDER)
    return place / "tables" / f"{slug(device)}.json"


def settle(device: str) -> Settled:
    """Set every declared table to what is known of a device (its name as CUDA tells it), the kept table last.

    Entries that no file names go back to their defaults, so that settling twice is settling once. Raises
    RidgelineError naming the file if one is damaged.
    """
    done = Settled(device)
    for tunable in TUNABLES.values():
        tunable.table.update(tunable.defaults)
    for file in (shipped_file(device), kept_file(device)):
        for name, part in _read(file).items():
            known = TUNABLES.get(name)
            if known is None or part["edition"] != known.edition:
                done.passed_over[name] = f"{file} was made for other choices; `ridgeline kernels tune` makes it anew"
                continue
            done.passed_over.pop(name, None)
            for key, values in part["entries"].items():
                known.table[key_of(key)] = entry_of(known, key_of(key), values)
                done.taken[name] = str(file)
    return done


def write(file: Path, device: str, chosen: Mapping[str, Mapping[Any, Any]], how: Mapping[str, Any]) -> None:
    """Keep a table: id -> key -> entry. What the file holds of other tables and keys stays. how: how it was made."""
    parts = _read(file) if file.exists() else {}
    for name, entries in chosen.items():
        tunable = TUNABLES[name]
        old = parts.get(name, {})
        known = old["entries"] if old.get("edition") == tunable.edition else {}
        new = {key_text(key): values_of(entry) for key, entry in entries.items()}
        parts[name] = {"edition": tunable.edition, "entries": {**known, **new}}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "made": dict(how), "tables": parts}
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def values_of(entry: Any) -> dict[str, Any]:
    """Fields and values of a table's entry."""
    return asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else dict(entry._asdict())


def changed(entry: Any, values: Mapping[str, Any]) -> Any:
    """The entry with other values of some fields."""
    return type(entry)(**{**values_of(entry), **values})


def key_text(key: Any) -> str:
    """A key of integers, or of a tuple of them, as JSON's: "2,128"."""
    return ",".join(map(str, key)) if isinstance(key, tuple) else str(key)


def key_of(text: str) -> Any:
    parts = tuple(int(part) for part in text.split(","))
    return parts if len(parts) > 1 else parts[0]


def entry_of(tunable: Tunable, key: Any, values: Mapping[str, Any]) -> Any:
    """The named tuple of a file's values; RidgelineError if the kernel has no such variant."""
    like = tunable.defaults.get(key)
    if like is None or set(values) != set(values_of(like)):
        raise RidgelineError(f"table {tunable.id}: no entry {key_text(key)} of {', '.join(values)}")
    entry = type(like)(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})
    free = {name: values[name] for name in tunable.axes}
    allowed = all(getattr(entry, name) in (*tunable.axes[name], getattr(like, name)) for name in free)
    fixed = all(getattr(entry, name) == value for name, value in values_of(like).items() if name not in tunable.axes)
    if not (entry == like or (allowed and fixed and tunable.exists(key, entry))):
        raise RidgelineError(f"table {tunable.id}: {entry} is no variant of the kernel for {key_text(key)}")
    return entry


def _read(file: Path) -> dict[str, Any]:
    """The tables of a file; nothing if there is none."""
    try:
        tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
        for part in tables.values():
            part["edition"], part["entries"].items()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RidgelineError(f"{file}: not a table of kernels ({error!r}); delete it or tune again") from None
    return dict(tables)
