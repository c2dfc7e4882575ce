"""What serving over HTTP costs beside the engine alone, and how the server bears load. The engine runs on one thread.

The server is a process of its own, as a user starts it; this process is its client, and runs the offline engine
(`LLM`) in turn with it. Random prompts, fresh in every round and the same for both sides; outputs of fixed length.

Lines: tokens/s of 32 streams over HTTP beside `LLM.generate` of the same requests; time to first token alone beside
`LLM.stream`; 1,000 streams at once; processor time while idle; valid throughput while 200 requests/s are refused;
process start to the first token of an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.models import checkpoint, vocabulary_of
from benchmarks.record import Record, alternate, interval, losing, parser, ratios, seconds, use_threads
from benchmarks.serving import Server, cpu_s, served
from ridgeline import LLM, SamplingParams
from ridgeline.workload.arrivals import Job, equal
from ridgeline.workload.http import Address, Client
from ridgeline.workload.load import Outcome, Target, ends, load
from ridgeline.workload.measure import report

PATH_COST, FIRST_COST_S, IDLE, SLOWER, START_S = 0.10, 0.005, 0.02, 0.10, 5.0
STREAMS = 32
TOTALS = ("sent", "milliseconds")
PARTS = ("streams", "first", "many", "idle", "refused", "start")


def main(argv: Sequence[str] | None = None) -> Record:
    options = arguments().parse_args(argv)
    if options.quick:
        options.rounds, options.new, options.prompt, options.many, options.pairs = 1, 16, 16, 40, 3
        options.idle_s, options.refused_s = 1.0, 1.0
    record = measure(options)
    record.close()
    return record


def arguments() -> argparse.ArgumentParser:
    result = parser(__doc__ or "")
    result.set_defaults(threads=1)
    result.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    result.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    result.add_argument("--new", type=int, default=256, help="output tokens of a stream")
    result.add_argument("--pairs", type=int, default=40, help="pairs of times to the first token")
    result.add_argument("--many", type=int, default=1000, help="streams at once")
    result.add_argument("--idle-s", type=float, default=20.0, help="seconds of idleness that are watched")
    result.add_argument("--refused-s", type=float, default=8.0, help="about how long each arm of the refusals takes")
    result.add_argument("--rate", type=float, default=200.0, help="refused requests a second")
    return result


def measure(options: argparse.Namespace) -> Record:
    use_threads(options.threads)
    folder, what = checkpoint(options.model)
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise SystemExit(f"--parts: of {', '.join(PARTS)}")
    record = Record("server-cpu" if set(parts) == set(PARTS) else f"server-cpu-{'-'.join(parts)}", options)
    record.settings = {
        "model": what,
        "engine_threads": options.threads,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "rounds": options.rounds,
        "client": "this process, ridgeline.workload.load; times count from when a request was to be sent",
    }
    named = None if what == "embedded model" else folder
    parts = options.parts.split(",")
    vocabulary = vocabulary_of(folder)
    if {"streams", "first"} & set(parts):
        with LLM(folder, device="cpu") as llm, served((), options.threads, named) as server:
            if "streams" in parts:
                streams(record, options, llm, server, vocabulary)
            if "first" in parts:
                first(record, options, llm, server, vocabulary)
    if {"many", "idle"} & set(parts):
        with served((), options.threads, named) as server:
            if "idle" in parts:
                idle(record, options, server)
            if "many" in parts:
                many(record, options, server, vocabulary)
    if "refused" in parts:
        refused(record, options, named, vocabulary)
    if "start" in parts:
        start(record, options, named)
    return record


def target_of(server: Server, vocabulary: int, seed: int) -> Target:
    return Target(model=server.get("/v1/models")["data"][0]["id"], vocabulary=vocabulary, seed=seed, timeout_s=300.0)


def send(server: Server, target: Target, jobs: Sequence[Job], concurrency: int | None = None) -> list[Outcome]:
    """Load the server; outcomes in the jobs' order."""

    async def work() -> list[Outcome]:
        async with Client(Address.of(server.url)) as client:
            return await load(client, target, jobs, concurrency)

    return asyncio.run(work())


def all_served(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same. RuntimeError if one was not served: such figures would mean nothing."""
    counted = ends(outcomes)
    if set(counted) != {"ok"}:
        details = {one.detail for one in outcomes if one.end}
        raise RuntimeError(f"not all were served: {counted} {details}")
    return list(outcomes)


def prompts(target: Target, jobs: Sequence[Job]) -> list[list[int]]:
    """The token ids that the server gets."""
    return [target.body(job, number)["prompt"] for number, job in enumerate(jobs)]


# The lines


def streams(record: Record, options: argparse.Namespace, llm: LLM, server: Server, vocabulary: int) -> None:
    """Tokens/s of 32 requests at once."""
    jobs = equal(STREAMS, options.prompt, options.new)
    params = SamplingParams(temperature=0, max_tokens=options.new, ignore_eos=True)

    def offline(number: int) -> float:
        given = prompts(target_of(server, vocabulary, number + 100), jobs)
        begin = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": one} for one in given], params, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert sum(len(one.outputs[0].token_ids) for one in outputs) == STREAMS * options.new
        return STREAMS * options.new / taken

    def online(number: int) -> float:
        outcomes = all_served(send(server, target_of(server, vocabulary, number + 100), jobs))
        found = report([one.served for one in outcomes])
        assert found.output_tokens == STREAMS * options.new
        return found.output_rate

    rates = alternate({"offline": offline, "server": online}, options.rounds)
    record.observe("streams")
    # Time a token over HTTP beside time a token offline: what the path adds.
    added = ratios(rates["offline"], rates["server"])
    cost = added.median - 1
    record.timings["streams"] = {name: [round(one, 2) for one in values] for name, values in rates.items()}
    record.summary["streams"] = {"tokens_per_s": {name: interval(values) for name, values in rates.items()},
                                 "time_over_offline": added}  # fmt: skip
    record.table(
        f"{STREAMS} streams of {options.prompt} + {options.new} tokens, {options.rounds} rounds",
        ["", "tokens/s"],
        [
            ["LLM.generate", interval(rates["offline"]).show(".0f")],
            ["over HTTP", losing(interval(rates["server"]).show(".0f"), cost > PATH_COST)],
            ["time over HTTP / offline", losing(added.show(".3f"), cost > PATH_COST)],
        ],
    )
    record.target(
        f"the HTTP path at {STREAMS} concurrent streams", f"adds ≤ {PATH_COST:.0%}", f"{cost:+.1%}", cost <= PATH_COST
    )


def first(record: Record, options: argparse.Namespace, llm: LLM, server: Server, vocabulary: int) -> None:
    """Time to first token, one request at a time."""
    job = Job(options.prompt, 4)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def offline(number: int) -> float:
        (given,) = prompts(target_of(server, vocabulary, number + 1000), [job])
        begin = time.perf_counter()
        parts = llm.stream({"prompt_token_ids": given}, params)
        next(parts)
        taken = time.perf_counter() - begin
        for _ in parts:
            pass
        return taken

    # The model list is asked for before, and the connection is kept, as a client library does.
    async def online() -> list[float]:
        found = []
        async with Client(Address.of(server.url)) as client:
            for number in range(-3, options.pairs):
                offline_times.append(offline(number))
                (one,) = all_served(await load(client, target_of(server, vocabulary, number + 1000), [job]))
                found.append(one.served.ttft_s)
        return found[3:]

    offline_times: list[float] = []
    online_times = asyncio.run(online())
    offline_times = offline_times[3:]
    record.observe("first")
    added = interval([a - b for a, b in zip(online_times, offline_times)])
    medians = interval(online_times).median - interval(offline_times).median
    record.timings["first"] = {"offline_s": seconds(offline_times), "server_s": seconds(online_times)}
    record.summary["first"] = {
        "offline_s": interval(offline_times), "server_s": interval(online_times), "added_s": added,
        "medians_apart_s": medians,
    }  # fmt: skip
    over = medians > FIRST_COST_S
    record.table(
        f"Time to first token alone, prompts of {options.prompt} tokens, {options.pairs} pairs",
        ["", "median"],
        [
            ["LLM.stream", interval(offline_times).show(".2f", " ms", 1e3)],
            ["over HTTP", interval(online_times).show(".2f", " ms", 1e3)],
            ["added, pair by pair", losing(added.show(".2f", " ms", 1e3), over)],
        ],
    )
    record.target(
        "median time to first token at concurrency 1 over the offline engine's",
        f"≤ {FIRST_COST_S * 1e3:.0f} ms more", f"{medians * 1e3:+.2f} ms", not over,
    )  # fmt: skip


def many(record: Record, options: argparse.Namespace, server: Server, vocabulary: int) -> None:
    """Streams that are all open at the same time."""
    jobs = equal(options.many, 16, 64)
    outcomes = send(server, target_of(server, vocabulary, 7), jobs)
    counted = ends(outcomes)
    done = [one.served for one in outcomes if not one.end]
    sent = max((one.served.arrival_s + one.late_s for one in outcomes), default=0.0)
    earliest = min((one.token_times_s[-1] for one in done), default=0.0)
    found = report([one.served for one in outcomes])
    wrong = options.many - counted.get("ok", 0) + sum(len(one.token_times_s) != 64 for one in done)
    record.observe("many")
    first_words = "" if found.ttft is None else f"{found.ttft.p50:.2f} / {found.ttft.p99:.2f} s"
    record.summary["many"] = {"ends": counted, "all_open_at_once": sent < earliest, **found.as_dict()}
    record.table(
        f"{options.many} streams at once, 16 + 64 tokens each",
        ["", ""],
        [
            ["ends", losing(", ".join(f"{end} × {count}" for end, count in counted.items()), bool(wrong))],
            ["all sent before the first had ended", str(sent < earliest)],
            ["tokens/s", f"{found.output_rate:,.0f}"],
            ["time to first token, p50 / p99", first_words],
        ],
    )  # fmt: skip
    record.target(f"{options.many:,} concurrent streams", "no error", f"{wrong} errors", wrong == 0)


def idle(record: Record, options: argparse.Namespace, server: Server) -> None:
    """Processor time of all the server's processes while nobody asks."""
    time.sleep(min(3.0, options.idle_s))
    pids = server.processes()
    before, begin = cpu_s(pids), time.perf_counter()
    time.sleep(options.idle_s)
    share = (cpu_s(pids) - before) / (time.perf_counter() - begin)
    record.observe("idle")
    record.summary["idle"] = {"share_of_a_core": share, "seconds": options.idle_s, "processes": len(pids)}
    record.target("idle CPU, all processes", f"< {IDLE:.0%} of a core", f"{share:.2%}", share < IDLE)


def refused(record: Record, options: argparse.Namespace, model: Path | None, vocabulary: int) -> None:
    """Valid throughput beside refused and invalid requests, which come from a process of their own."""
    seats, valid = 16, 12
    limits = ("--max-num-seqs", str(seats), "--max-queued", "0")
    with served(limits, options.threads, model) as server:
        probe = equal(valid, options.prompt, options.new)
        all_served(send(server, target_of(server, vocabulary, 1), probe))
        begin = time.perf_counter()
        all_served(send(server, target_of(server, vocabulary, 2), probe))
        each_s = time.perf_counter() - begin
        # Outputs of unequal length: if all ended in one step, there would be room for a moment.
        draw = random.Random(5)
        count = valid * max(2, round(options.refused_s / each_s))
        jobs = [Job(options.prompt, draw.randint(options.new // 2, options.new * 3 // 2)) for _ in range(count)]
        told: list[dict[str, int]] = []

        def alone(number: int) -> float:
            outcomes = all_served(send(server, target_of(server, vocabulary, 100 + number), jobs, valid))
            return report([one.served for one in outcomes]).output_rate

        def pestered(number: int) -> float:
            command = [sys.executable, "-m", "benchmarks.pester", server.url, "--rate", str(options.rate),
                       "--outputs", str(seats)]  # fmt: skip
            other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
            assert other.stdin is not None
            begin = threading.Timer(2.2, lambda: _go(other))
            try:
                begin.start()
                time.sleep(2.0)  # it has started, and begins when the valid ones are in
                outcomes = all_served(send(server, target_of(server, vocabulary, 200 + number), jobs, valid))
            finally:
                begin.join()
                out, _ = other.communicate(timeout=60)
            told.append(json.loads(out))
            return report([one.served for one in outcomes]).output_rate

        rates = alternate({"alone": alone, "beside refusals": pestered}, options.rounds)
    record.observe("refused")
    kept = ratios(rates["beside refusals"], rates["alone"])
    counted: dict[str, int] = {}
    for one in told:
        for name, count in one.items():
            counted[name] = counted.get(name, 0) + count
    sent_per_s = 1e3 * counted["sent"] / counted["milliseconds"]
    let_in = counted.get("200", 0) / counted["sent"]
    record.timings["refused"] = {name: [round(one, 2) for one in values] for name, values in rates.items()}
    record.summary["refused"] = {
        "tokens_per_s": {name: interval(values) for name, values in rates.items()}, "kept": kept, "answers": counted,
        "refused_per_s": sent_per_s, "let_in": let_in,
    }  # fmt: skip
    change = kept.median - 1
    over = abs(change) > SLOWER
    statuses = ", ".join(
        f"{name} × {count}" for name, count in sorted(counted.items()) if name.isdigit() or name == "connection"
    )
    record.table(
        f"{valid} valid streams, alone and beside {sent_per_s:.0f} refused requests/s ({statuses})",
        ["", "tokens/s"],
        [
            ["alone", interval(rates["alone"]).show(".0f")],
            ["beside refusals", losing(interval(rates["beside refusals"]).show(".0f"), over)],
            ["ratio", losing(kept.show(".3f"), over)],
        ],
    )  # fmt: skip
    record.note(
        "the refused requests' own client runs on this machine too, and takes from the processors what it takes; "
        f"{let_in:.1%} of its requests found an empty server and were served"
    )
    record.target(
        f"throughput of valid requests beside {options.rate:.0f} refused requests/s",
        f"within {SLOWER:.0%}", f"{change:+.1%}", not over,
    )  # fmt: skip


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    process.stdin.flush()


def start(record: Record, options: argparse.Namespace, model: Path | None) -> None:
    """Process start to the first token of a streamed answer, caches warm."""
    times, ready = [], []
    for number in range(options.rounds + 1):
        server = Server((), options.threads, model)
        try:
            server.wait_ready()
            at_ready = time.perf_counter() - server.began_s
            first_token_s = _first_token(server) - server.began_s
        finally:
            server.stop()
        if number:  # the first run warms the disk
            ready.append(at_ready)
            times.append(first_token_s)
    found = interval(times)
    record.observe("start")
    record.timings["start"] = {"ready_s": seconds(ready), "first_token_s": seconds(times)}
    record.summary["start"] = {"ready_s": interval(ready), "first_token_s": found}
    record.target(
        f"ridgeline serve: process start to first served token, median of {len(times)}",
        f"≤ {START_S:.0f} s", found.show(".2f", " s"), found.median <= START_S,
    )  # fmt: skip


def _first_token(server: Server) -> float:
    """When the first event with text came."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    model = server.get("/v1/models")["data"][0]["id"]
    draw = random.Random(3)
    body: dict[str, Any] = {
        "model": model, "prompt": [draw.randrange(200) for _ in range(16)], "max_tokens": 4, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = link.getresponse()
    assert answer.status == 200, answer.read()
    while line := answer.readline():
        if line.startswith(b"data: {"):
            at = time.perf_counter()
            link.close()
            return at
    raise RuntimeError("the stream ended without a token")


if __name__ == "__main__":
    main()
