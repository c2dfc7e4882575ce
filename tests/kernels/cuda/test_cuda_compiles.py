"""Every .cu compiles, without a GPU, for each architecture that it names: a pairwise cover of its instances.

Serialized wgmma, an ignored setmaxnreg and spills where none are expected are failures. make kernels-all compiles
the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ridgeline.kernels.cuda import nvrtc
from ridgeline.kernels.cuda.instances import Defines, Instances, declared

DECLARED = declared()
COVER = [(name, choice) for name, instances in DECLARED.items() for choice in instances.cover()]


def label(name: str, choice: Defines) -> str:
    return f"{name}-{'-'.join(map(str, choice.values()))}"


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[list[str]]]]:
    """What is wrong with each instance that is asked for, compiled ahead on both cores."""
    asked = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(2) as threads:
        yield {
            label(name, choice): threads.submit(DECLARED[name].faults, choice)
            for name, choice in COVER
            if label(name, choice) in asked
        }
        threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("which", [label(*one) for one in COVER])
def test_an_instance_compiles_without_faults(which: str, compiled: dict[str, Future[list[str]]]) -> None:
    assert compiled[which].result() == []


def test_every_source_is_declared() -> None:
    sources = {path.name for path in Path(nvrtc.FOLDER).glob("*.cu")}
    assert {instances.file for instances in DECLARED.values()} == sources


def test_a_cover_holds_every_pair_that_exists() -> None:
    instances = Instances(
        "none.cu",
        ("sm_80", "sm_90a"),
        {"A": (0, 1, 2), "B": (0, 1), "C": ("x", "y")},
        exists=lambda choice: choice["A"] != 2 or choice["architecture"] == "sm_90a",
    )
    every, cover = list(instances.all()), instances.cover()
    assert len(cover) < len(every) == 20

    def pairs(choices: list[Defines]) -> set[object]:
        return {pair for choice in choices for pair in itertools.combinations(sorted(choice.items()), 2)}

    assert pairs(cover) == pairs(every)


def test_faults_are_found(tmp_path: Path) -> None:
    """A kernel that spills, and a log that speaks of serialization."""
    path = tmp_path / "spills.cu"
    path.write_text(
        'extern "C" __global__ void __launch_bounds__(1024) spills(float* x, int n) { float a[200];\n'
        "#pragma unroll\nfor (int i = 0; i < 200; i++) a[i] = x[i * n];\n__syncthreads();\n"
        "#pragma unroll\nfor (int i = 0; i < 200; i++) x[i * n] = a[199 - i] * a[i]; }"
    )
    instances = Instances(str(path), ("sm_80",), {"A": (0,)})
    (fault,) = instances.faults({"architecture": "sm_80", "A": 0})
    assert fault.startswith("spills")
