"""The benchmark of attention on a CPU, at sizes that mean nothing: who runs, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.core.cost import Cost
from ridgeline.core.errors import InvalidArgument, KernelRefused
from ridgeline.kernels.select import load_kernels
from ridgeline.ops import REGISTRY
from ridgeline.ops.op import Kernel, anywhere, cuda
from ridgeline.perf.limit import Limit
from ridgeline.study.attention import bench, contestants, counters, memory, peers, plots, report, rungs, traffic
from ridgeline.study.attention.bench import Settings
from ridgeline.study.attention.cases import Case, Choice

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = Choice(batches=(1, 4), sequences=(32,), heads=2, head_dims=(16,), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure_limit", lambda device, size, dtype: Limit("cpu", size, 4e9, 4e9, 1e11))


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    """A ladder of our own: a standard, one that knows its traffic, a wrong one, one that refuses, one for a GPU."""
    load_kernels("cpu")
    attention = REGISTRY["attention"]

    def wrong(**arguments: Any) -> torch.Tensor:
        return attention.reference(**arguments) + 0.5

    def counted(**arguments: Any) -> Cost:
        return Cost(0, 1000, 500)

    made = {
        "reference-like": Kernel("standard", anywhere(), attention.reference, traffic=lambda **_: Cost(0, 4000, 2000)),
        "v2": Kernel("v2", anywhere(), attention.reference, traffic=counted),
        "wrong": Kernel("wrong", anywhere(), wrong),
        "picky": Kernel("picky", anywhere(), attention.reference, accepts=lambda **_: "q: picky takes nothing at all"),
        "far": Kernel("far", cuda(90), attention.reference),
    }
    kernels = {one.name: one for one in made.values()}
    monkeypatch.setattr(attention, "kernels", kernels)
    return kernels


def test_the_report(ladder: dict[str, Kernel]) -> None:
    told: list[tuple[int, int]] = []
    settings = Settings(rounds=3)
    names = ["standard", "v2", "picky"]
    result = bench.run("report", SMALL, settings, names, ["math"], lambda done, total, what: told.append((done, total)))
    assert json.loads(json.dumps(result)) == result
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    assert [one["name"] for one in result["contestants"]] == [*names, "math"]
    assert [cell["case"]["batch"] for cell in result["cells"]] == [1, 4]
    for cell in result["cells"]:
        standard, own = cell["results"]["standard"], cell["results"]["v2"]
        assert cell["results"]["picky"] == {"refused": "q: picky takes nothing at all"}
        for one in (standard, own, cell["results"]["math"]):
            low, middle, high = one["seconds"][1], one["seconds"][0], one["seconds"][2]
            assert 0 < low <= middle <= high
            assert len(one["samples"]) == 3
            assert one["error"] <= 2 * one["error_of_pytorch"] + 1e-5
            assert one["flops_per_s"] == pytest.approx(cell["case"]["flops"] / middle)
        assert own["counted"] == {"read_bytes": 1000, "write_bytes": 500, "bytes": 1500}
        assert own["best_peer"] == "math"
        pairs = sorted(a / b for a, b in zip(standard["samples"], own["samples"]))
        assert own["over_standard"][0] == pytest.approx(pairs[1])
        assert "over_standard" not in standard
    words = report.tables(result)
    assert [table.title.split(":")[0] for table in words] == [
        "The report's experiment", "Bytes between the multiprocessors and memory"
    ]  # fmt: skip
    assert {len(row) for table in words for row in table.rows} == {8, 7}
    assert any("picky takes nothing at all" in line and "and 1 more" in line for line in report.refusals(result))
    lines = report.claims(result)
    assert len(lines) == 3
    assert "4.61, 3.72, 1.27, 19.48" in lines[-1]


def test_wrong_numbers_are_not_timed(ladder: dict[str, Kernel]) -> None:
    result = bench.run("report", SMALL, Settings(rounds=1), ["wrong"], ["none"])
    one = result["cells"][0]["results"]["wrong"]
    assert one["wrong"]
    assert "seconds" not in one
    assert "wrong result: an error of 0.5" in one["refused"]
    assert len(report.wrong(result)) == 2
    unchecked = bench.run("report", SMALL, Settings(rounds=1, check=False), ["wrong"], ["none"])
    assert "seconds" in unchecked["cells"][0]["results"]["wrong"]
    assert not report.wrong(unchecked)


def test_all_that_run_here_take_part_and_no_other(ladder: dict[str, Kernel]) -> None:
    assert list(rungs.rungs(CPU)) == ["standard", "v2", "picky", "wrong"]
    assert contestants.assemble(CPU, [], []).names == ["standard", "v2", "picky", "wrong", "math", "torch-cpu"]
    assert contestants.assemble(CPU, ["reference"], ["none"]).names == ["reference"]


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ((["v22"], []), InvalidArgument, "no kernel 'v22'; did you mean v2?"),
        ((["xyz"], []), InvalidArgument, "known are standard, v2"),
        ((["far"], []), KernelRefused, "kernel far needs a cuda device; this device runs standard, v2"),
        (([], ["maths"]), InvalidArgument, "did you mean math?"),
        (([], ["fa3"]), InvalidArgument, "on cpu there are math, torch-cpu"),
    ],
)
def test_names_that_cannot_run(ladder: dict[str, Kernel], wanted: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        contestants.assemble(CPU, *wanted)
    assert said in str(caught.value)


def test_a_peer_without_its_library_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(peers.FA3_VARIABLE, raising=False)
    _, left_out = peers.chosen([], torch.device("cuda"))
    assert "FA3_LIBRARY" in left_out["fa3"]
    monkeypatch.setenv(peers.FA3_VARIABLE, str(tmp_path / "missing.so"))
    with pytest.raises(KernelRefused, match="no file"):
        peers.chosen(["fa3"], torch.device("cuda"))


@pytest.mark.parametrize("page", [None, 16])
def test_peers_answer_the_same_question(page: int | None) -> None:
    """Views of the call's memory: equal results where keys are the same, equal work where they are not."""
    for new, causal in ((32, False), (32, True), (1, True)):
        case = Case("sweep", 2, 4, 2, 16, new, 32, causal, "float32", page)
        call = bench.tensors.make(case, CPU)
        for name in ("math", "torch-cpu"):
            one = contestants.by_name(name, CPU)
            works = one.prepare(case, [call])
            with works.context():
                out = one.rows(case, works.calls[0]())
            assert out.shape == call.q.shape
            assert one.answers(case) == (page is None)
            if page is None:
                assert bench.tensors.error_of(case, call, out)[0] < 1e-5
    with pytest.raises(KernelRefused, match="no causal mask for 3 queries"):
        contestants.by_name("math", CPU).prepare(Case("sweep", 1, 2, 2, 16, 3, 32, True, "float32"), [])


def test_settings_that_are_refused() -> None:
    for values in ({"rounds": 0}, {"copies": 0}):
        with pytest.raises(InvalidArgument):
            Settings(**values)
    with pytest.raises(KernelRefused, match="CPU has no memory counters"):
        bench.run("report", SMALL, Settings(counters=True))
    with pytest.raises(InvalidArgument, match="device"):
        bench.run("report", Choice(device="tpu"), Settings())
    if not torch.cuda.is_available():
        with pytest.raises(InvalidArgument, match="0 CUDA devices"):
            bench.run("report", Choice(device="cuda"), Settings())


def test_decode_and_sweep_tables_and_every_picture(ladder: dict[str, Kernel], tmp_path: Path) -> None:
    for experiment, titles in (("decode", "Decode, time"), ("sweep", "Forward attention, GFLOP/s")):
        result = bench.run(experiment, SMALL, Settings(rounds=1), ["standard", "v2"], ["math"])
        first, moved = report.tables(result)
        assert first.title.startswith(titles)
        assert moved.columns[3] == "counted"
        written = plots.draw(result, tmp_path)
        kinds = ("rates", "speedup", "roofline")
        assert [path.name for path in written] == [f"attention-{experiment}-{kind}.png" for kind in kinds]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_memory_of_a_process_of_its_own(tmp_path: Path) -> None:
    """Plain attention needs its score matrices, torch's fused kernel does not."""
    choice = Choice(sequences=(512, 1024), heads=8, head_dims=(16,), dtype="float32", device="cpu")
    result = bench.run("memory", choice, Settings(), ["reference"], ["torch-cpu"])
    scores = [cell["case"]["score_matrix_bytes"] for cell in result["cells"]]
    plain = [cell["results"]["reference"]["peak_bytes"] for cell in result["cells"]]
    fused = [cell["results"]["torch-cpu"]["peak_bytes"] for cell in result["cells"]]
    assert all(peak > 1.8 * score for peak, score in zip(plain, scores))
    assert fused[-1] < scores[-1] / 4
    assert report.exponent(result, "reference") == pytest.approx(2, abs=0.2)
    assert "reference: peak memory grows as S^" in report.claims(result)[0]
    assert report.tables(result)[0].rows[-1][0] == "growth at the end"
    assert [path.name for path in plots.draw(result, tmp_path)] == ["attention-memory-memory.png"]


def test_operators_are_counted_as_torch_runs_them() -> None:
    x, y = torch.randn(8, 16), torch.randn(16, 4)
    assert traffic.operators(lambda: x @ y) == Cost(0.0, 4 * (8 * 16 + 16 * 4), 4 * 8 * 4, launches=1)
    assert traffic.operators(lambda: x.t()[1:].unsqueeze(0)).bytes == 0
    spread = y[:, :1].expand(16, 4)
    assert traffic.operators(lambda: spread + 1) == Cost(0.0, 4 * 16, 4 * 64, launches=1)
    out = torch.empty(8, 16)
    assert traffic.operators(lambda: out.copy_(x)) == Cost(0.0, 4 * 128, 4 * 128, launches=1)
    assert traffic.operators(lambda: out.add_(x)) == Cost(0.0, 8 * 128, 4 * 128, launches=1)


def test_traffic_of_the_algorithms() -> None:
    """FlashAttention's passes over O, l and m; FlashAttention-2's tiles; never below the floor."""
    case = Case("sweep", 2, 4, 4, 64, 256, 256, False, "bfloat16")
    call = bench.tensors.shapes(case)
    side, state = 2 * 4 * 256 * 64 * 2, 2 * 4 * 256 * (64 * 4 + 8)
    assert traffic.carried(call, 256, 64) == Cost(0.0, 3 * side, side)
    assert traffic.carried(call, 64, 64) == Cost(0.0, 2 * side + 4 * side + 3 * state, 3 * state + side)
    assert traffic.tiled(call, 256, packed=False) == Cost(0.0, 3 * side, side)
    assert traffic.tiled(call, 64, packed=False) == Cost(0.0, side + 4 * 2 * side, side)
    causal = bench.tensors.shapes(Case("sweep", 2, 4, 4, 64, 256, 256, True, "bfloat16"))
    assert traffic.tiled(causal, 64, packed=False).read_bytes == side + (64 + 128 + 192 + 256) / 256 * 2 * side
    # Algorithm 1 skips what a block of rows does not see: 1, 2, 3 and 4 passes for the four blocks of rows.
    assert traffic.carried(causal, 64, 64).read_bytes == 2 * side + 10 / 4 * side + 6 / 4 * state
    grouped = bench.tensors.shapes(Case("decode", 3, 8, 2, 64, 1, 100, True, "bfloat16"))
    once = traffic.TRAFFIC["decode"](grouped)
    assert once.bytes == REGISTRY["attention"].floor(**grouped._asdict()).bytes
    keys = 2 * 3 * 100 * 2 * 64 * 2
    assert traffic.tiled(grouped, 16, packed=False).read_bytes == once.read_bytes + 3 * keys


TABLE = """==PROF== Connected to process 7
something that the process printed
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","lts__t_bytes.sum",\
"lts__t_sectors_srcunit_tex_op_read.sum","lts__t_sectors_srcunit_tex_op_write.sum"
"","","","byte","byte","byte","sector","sector"
"0","7","spin_kernel(long)","0","0","32","0","0"
"1","7","scores","1,000","10","4000","100","50"
"2","7","softmax","0","20","4000","10","5"
"3","7","scores","3,000","10","4000","100","50"
"4","7","softmax","0","20","4000","10","5"
"5","7","spin_kernel(long)","0","0","32","0","0"
"6","7","fused","240","300","240","9","9"
"""


def test_the_profilers_table() -> None:
    standard, fused = counters.parse(TABLE, [2, 1])
    assert (standard.calls, standard.kernels, fused.kernels) == (2, 2, 1)
    assert standard.hbm_bytes == 2000 + 30
    assert standard.l2_bytes == 32 * 165
    assert standard.as_dict()["l2_all_bytes"] == 8000
    assert fused.hbm_bytes == 540
    with pytest.raises(KernelRefused, match="2 markers where 3 were set"):
        counters.parse(TABLE, [1, 1, 1])
    with pytest.raises(KernelRefused, match="printed no table: no permission"):
        counters.parse("no permission", [1])


def test_without_a_profiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelRefused, match="ncu"):
        counters.profiler()


def test_growth() -> None:
    assert memory.growth([128, 256, 512], [1, 4, 16]) == pytest.approx(2)
    assert memory.growth([128, 256], [0, 4]) is None


def test_verdicts_follow_the_bytes(ladder: dict[str, Kernel]) -> None:
    result = bench.run("report", SMALL, Settings(rounds=1), ["standard", "v2"], ["none"])
    cell = result["cells"][0]
    one = cell["results"]["v2"]

    def verdict(gain: float, own: float, other: float) -> str:
        one["over_standard"] = [gain, gain, gain]
        one["counted"]["bytes"], cell["results"]["standard"]["counted"]["bytes"] = own, other
        return report.claims(result)[0]

    assert "faster, and it touches memory less: counted memory bytes 1 kB against standard's 4 kB" in verdict(
        2, 1e3, 4e3
    )
    assert "faster, but NOT by touching memory less" in verdict(2, 1e3, 1.1e3)
    assert "no gain" in verdict(0.9, 1e3, 4e3)
    one["measured"] = {"hbm_bytes": 1e3}
    assert cell["case"]["label"] not in report.claims(result)[0], "measured bytes are never held against counted ones"


@pytest.mark.parametrize("page", [None, 16])
def test_standard_bound_at_once_is_standard(page: int | None) -> None:
    """Algorithm 0 on the batch's matrices is what the registered kernel computes."""
    load_kernels("cpu")
    kernel = REGISTRY["attention"].kernels["standard"]
    for new, causal in ((32, False), (32, True), (7, True), (1, True)):
        case = Case("sweep", 3, 4, 2, 16, new, 40 if new < 32 else 32, causal, "float32", page)
        call = bench.tensors.make(case, CPU)
        out = contestants.Contestant("standard", kernel=kernel).rows(case, rungs.bound(kernel, case, call)())
        torch.testing.assert_close(out, kernel.call(**call._asdict()), atol=1e-6, rtol=1e-5)
        assert bench.tensors.error_of(case, call, out)[0] < 1e-5


GPU = Choice(batches=(1, 4), sequences=(64,), heads=8, head_dims=(64,))


@pytest.mark.gpu
def test_on_a_gpu_in_graphs_and_without() -> None:
    for settings in (Settings(rounds=3), Settings(rounds=3, graph=False)):
        result = bench.run("report", GPU, settings, ["standard", "v2", "triton"], ["fa2", "math"])
        assert not report.wrong(result)
        for cell in result["cells"]:
            assert cell["clocks"]["before"]["clocks.sm"].endswith("MHz")
            assert all(one["graph"] == settings.graph and one["seconds"][0] > 0 for one in cell["results"].values())
            assert cell["copies"] * cell["case"]["floor_bytes"] >= 4 * result["device"]["l2_bytes"]
    decode = bench.run("decode", Choice(batches=(1,), sequences=(512,)), Settings(rounds=3), ["decode"], ["fa2"])
    one = decode["cells"][0]["results"]["decode"]
    assert one["calls"] >= 64
    assert one["eager_seconds"][0] > 0


@pytest.mark.gpu
def test_counters_on_a_gpu() -> None:
    """Bytes at L2 are those of the count, and a rung that waits for the host says so."""
    try:
        counters.profiler()
    except KernelRefused as error:
        pytest.skip(str(error))
    choice = Choice(batches=(16,), sequences=(512,), heads=16, head_dims=(64,), causal=False)
    result = bench.run("sweep", choice, Settings(rounds=1, counters=True), ["v2", "blocked"], ["none"])
    assert not report.wrong(result)
    (cell,) = result["cells"]
    assert "no graph can hold it" in cell["results"]["blocked"]["refused"]
    one = cell["results"]["v2"]
    assert one["measured"]["kernels"] == 1
    assert one["measured"]["l2_bytes"] == pytest.approx(one["counted"]["bytes"], rel=0.15)


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    choice = Choice(sequences=(512, 1024), heads=8, head_dims=(64,))
    result = bench.run("memory", choice, Settings(), ["standard", "v2"], ["none"])
    assert report.exponent(result, "standard") == pytest.approx(2, abs=0.2)
    assert report.exponent(result, "v2") == pytest.approx(1, abs=0.1)


def test_flash_attention_3_is_called_as_its_library_declares() -> None:
    """The declaration of vLLM's build, and a forward of no work that takes it; contiguous keys and pages."""
    library = torch.library.Library("_vllm_fa3_C", "DEF")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out,"
        " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
        " Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q,"
        " int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,"
        " Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
        " float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,"
        " bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin,"
        " Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
    )
    given: list[tuple[Any, ...]] = []

    def forward(*arguments: Any) -> list[torch.Tensor]:
        given.append(arguments)
        return [arguments[0].clone()]

    library.impl("fwd", forward, "CPU")
    for page in (None, 16):
        case = Case("sweep", 2, 2, 2, 16, 32, 32, True, "bfloat16", page)
        call = bench.tensors.make(case, CPU)
        (run,) = peers._fa3(case, [call]).calls
        assert run().shape == call.q.shape
        said = given[-1]
        assert (said[12], said[13], said[23], said[24]) == (32, 32, pytest.approx(0.25), True)
        assert (said[14] is None) == (page is None)
    library._destroy()
