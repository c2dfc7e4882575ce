"""All steps of a GPU in a row: what is run, skipped, stopped, kept; and that each step names what there is."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_all
from benchmarks.gpu_all import STEPS, Step

HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("on", flush=True)
time.sleep(60)
"""


def python(code: str) -> Any:
    return lambda options: ["-c", code.format(out=options.out)]


def state_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / gpu_all.STATE).read_text())["steps"]
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        Step("good", 1, "writes", python("open(r'{out}/good.json', 'w').write('1'); print('well')")),
        Step("bad", 1, "fails", python("print('no luck'); raise SystemExit(3)")),
        Step("long", 0.005, "hangs, with a child", python(HANGS)),
        Step("more", 50, "takes an hour", python("open(r'{out}/more.json', 'w').write('1')")),
    )
    monkeypatch.setattr(gpu_all, "STEPS", made)


@pytest.mark.usefixtures("steps")
def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_all.main(["--out", str(tmp_path), "--minutes", "5", "--patience", "4"]) == 1
    found = state_of(tmp_path)
    assert {name: one["status"] for name, one in found.items()} == {"good": "done", "bad": "failed", "long": "too long"}
    assert found["good"]["results"] == ["good/good.json"]
    assert found["bad"]["code"] == 3
    assert 1 <= found["long"]["seconds"] < 20
    assert (tmp_path / found["long"]["log"]).read_text() == "on\n"
    said = capsys.readouterr().out
    assert "no luck" in said
    assert "more: takes 50 minutes" in said


@pytest.mark.usefixtures("steps")
def test_what_is_done_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["good", "bad", "--out", str(tmp_path)]
    gpu_all.main(arguments)
    first = state_of(tmp_path)
    gpu_all.main(arguments)
    second = state_of(tmp_path)
    assert second["good"] == first["good"]
    assert "good: done before" in capsys.readouterr().out
    (tmp_path / "good" / "good.json").unlink()
    assert gpu_all.main(["good", "--again", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "good" / "good.json").is_file()
    assert set(state_of(tmp_path)) == {"good", "bad"}


def test_several_gpus_take_steps_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone on its device; a step that reads another's results waits for it, also where a device is free."""
    note = """
import os, pathlib, time
folder = pathlib.Path(r'{out}')
(folder / 'began').write_text(os.environ['CUDA_VISIBLE_DEVICES'])
other = folder.parent / '%s' / 'began'
until = time.monotonic() + 30
while not other.is_file() and time.monotonic() < until:
    time.sleep(0.01)
(folder / 'saw.json').write_text(other.read_text())
"""
    made = (
        Step("left", 1, "waits for right", python(note % "right")),
        Step("right", 1, "waits for left", python(note % "left")),
        Step("last", 1, "reads both", python(note % "left"), after="right"),
    )
    monkeypatch.setattr(gpu_all, "STEPS", made)
    assert gpu_all.main(["--out", str(tmp_path), "--gpus", "0", "1"]) == 0
    assert {(tmp_path / name / "saw.json").read_text() for name in ("left", "right")} == {"0", "1"}
    found = state_of(tmp_path)
    assert found["last"]["began"] >= found["right"]["began"]
    assert (tmp_path / "last" / "saw.json").is_file()


@pytest.mark.usefixtures("steps")
def test_steps_are_listed_chosen_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_all.main(["--list", "--skip", "more"]) == 0
    said = capsys.readouterr().out
    assert "hangs" in said
    assert "an hour" not in said
    gpu_all.main(["good", "more", "--skip", "good", "--out", str(tmp_path)])
    assert set(state_of(tmp_path)) == {"more"}
    with pytest.raises(SystemExit, match="--out"):
        gpu_all.main(["good"])
    with pytest.raises(SystemExit):
        gpu_all.main(["goood", "--out", str(tmp_path)])


def test_told_to_end_it_stops_what_it_has_started(tmp_path: Path) -> None:
    """Steps run in sessions of their own: nobody else ends them when this process is."""
    endless = "import os, pathlib, time; pathlib.Path(r'{out}', 'pid').write_text(str(os.getpid())); time.sleep(60)"
    program = f"""
import sys
from benchmarks import gpu_all
from benchmarks.gpu_all import Step
command = lambda options: ["-c", {endless!r}.format(out=options.out)]
gpu_all.STEPS = [Step(name, 5, "sleeps", command) for name in ("first", "second", "third")]
sys.exit(gpu_all.main(["--out", sys.argv[1], "--gpus", "0", "1"]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=gpu_all.ROOT, env=environment)
    files = [tmp_path / name / "pid" for name in ("first", "second")]
    try:
        until = time.monotonic() + 60
        while not all(file.is_file() and file.read_text() for file in files) and time.monotonic() < until:
            time.sleep(0.05)
        children = [int(file.read_text()) for file in files]
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    assert {name: one["status"] for name, one in state_of(tmp_path).items()} == {
        "first": "stopped",
        "second": "stopped",
    }


def test_processes_of_tests_do_not_take_all_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = python("import os; open(r'{out}/threads.json', 'w').write(os.environ.get('OMP_NUM_THREADS', 'all'))")
    made = (Step("test", 1, "limited", show, environment=gpu_all.THREADS), Step("other", 1, "free", show))
    monkeypatch.setattr(gpu_all, "STEPS", made)
    for given, seen in ((None, ("4", "all")), ("2", ("2", "2"))):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert gpu_all.main(["--out", str(tmp_path), "--again"]) == 0
        assert tuple((tmp_path / step.name / "threads.json").read_text() for step in made) == seen
    assert all(step.environment == gpu_all.THREADS for step in STEPS if step.name.startswith("tests-"))


@pytest.mark.parametrize("step", STEPS, ids=[step.name for step in STEPS])
def test_each_step_names_options_that_there_are(step: Step, tmp_path: Path) -> None:
    options = argparse.Namespace(out=tmp_path, quick=False, commit="abc", fa3=tmp_path / "fa3.so")
    kind, name, *rest = step.command(options)
    assert step.minutes > 0
    if kind == "-m" and name.startswith("benchmarks."):
        module = importlib.import_module(name)
        parsed = module.arguments().parse_args(rest)
        assert parsed.out == tmp_path
        assert parsed.commit == "abc"
    elif kind == "-c":
        compile(name, step.name, "exec")
    else:
        assert name == "pytest"


def test_failures_are_in_the_log_before_the_end(tmp_path: Path) -> None:
    """A step of tests that is stopped has told of what failed until then, from workers too."""
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_bad():\n    assert 'why it failed' == ''\ndef test_long():\n    time.sleep(60)\n"
    )
    log = tmp_path / "log.txt"
    plugin = ["-p", "benchmarks.at_once", "-p", "no:cacheprovider", "-n", "1"]
    with log.open("w") as out:
        command = [sys.executable, "-m", "pytest", *plugin, "-c", os.devnull, str(tmp_path / "test_two.py")]
        process = subprocess.Popen(
            command, cwd=gpu_all.ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            until = time.monotonic() + 40
            while "why it failed" not in log.read_text() and time.monotonic() < until:
                time.sleep(0.1)
            assert process.poll() is None
        finally:
            gpu_all.stop(process)
    assert "FAILED" in log.read_text()
    assert "why it failed" in log.read_text()
