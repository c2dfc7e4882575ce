"""The ways in which a source is compiled, and a small number of them that covers every pair of choices.

Knows defines and architectures. It must not know what any define means. A kernel's module declares its
INSTANCES; CI compiles `cover()` of each, `python -m ridgeline.kernels.cuda.instances` (make kernels-all) all.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ridgeline.kernels.cuda import nvrtc

Defines = dict[str, int | str]
ARCHITECTURE = "architecture"
SERIALIZED = re.compile(r"C75(?:08|10|12|13|14)\b.*")
SPILLS = re.compile(r"(\d+) bytes spill stores")


def _as_chosen(choice: Mapping[str, int | str]) -> Defines:
    return dict(choice)


def _any(choice: Mapping[str, int | str]) -> bool:
    return True


@dataclass(frozen=True)
class Instances:
    """What a source can be compiled as.

    axes: names and the values they take; architectures are an axis too. exists: which choices there are.
    defines: a choice -> the defines of the file (tiles that follow from a head dim, say). spill_bytes: a
    choice -> how much may be spilled: not more than 0 where a loop would suffer.
    """

    file: str
    architectures: tuple[str, ...]
    axes: Mapping[str, Sequence[int | str]]
    defines: Callable[[Mapping[str, int | str]], Defines] = _as_chosen
    exists: Callable[[Mapping[str, int | str]], bool] = _any
    spill_bytes: Callable[[Mapping[str, int | str]], int] = lambda choice: 0

    def all(self) -> Iterator[Defines]:
        """Every choice, ARCHITECTURE among its names."""
        names = (ARCHITECTURE, *self.axes)
        for values in itertools.product(self.architectures, *self.axes.values()):
            choice = dict(zip(names, values))
            if self.exists(choice):
                yield choice

    def cover(self, most: int = 40) -> list[Defines]:
        """Choices in which every pair of values that exists appears: greedy, at most `most` of them."""
        choices = list(self.all())
        pairs = [frozenset(itertools.combinations(sorted(choice.items()), 2)) for choice in choices]
        missing = frozenset[tuple[tuple[str, int | str], ...]]().union(*pairs)
        chosen = []
        while missing:
            best = max(range(len(choices)), key=lambda index: len(pairs[index] & missing))
            chosen.append(choices[best])
            missing -= pairs[best]
        assert len(chosen) <= most, f"{self.file}: a pairwise cover takes {len(chosen)} instances"
        return chosen

    def faults(self, choice: Mapping[str, int | str]) -> list[str]:
        """Compile one choice; what ptxas said that it must not say: serialized wgmma, ignored setmaxnreg, spills."""
        plain = {name: value for name, value in choice.items() if name != ARCHITECTURE}
        log = nvrtc.compile(self.file, self.defines(plain), str(choice[ARCHITECTURE])).log
        found = [match.group(0) for match in SERIALIZED.finditer(log)]
        spilled = max(map(int, SPILLS.findall(log)), default=0)
        if spilled > self.spill_bytes(choice):
            found.append(f"spills {spilled} bytes, {self.spill_bytes(choice)} are expected at most")
        return found


def declared() -> dict[str, Instances]:
    """The INSTANCES of every module of this folder, by module name."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        instances = getattr(importlib.import_module(f"{__package__}.{module.name}"), "INSTANCES", None)
        if instances is not None:
            found[module.name] = instances
    return found


def main() -> int:
    """Compile everything; print a line a module, and every fault. Returns 1 if there was one."""
    wrong = 0
    for name, instances in declared().items():
        start, choices = time.perf_counter(), list(instances.all())
        with ThreadPoolExecutor() as threads:
            for choice, faults in zip(choices, threads.map(instances.faults, choices)):
                for fault in faults:
                    wrong += 1
                    print(f"{name} {choice}: {fault}")
        print(f"{name}: {len(choices)} instances in {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
