"""Licences, filters, duplicates and the split: what may enter the corpus, on made-up metadata and files."""

from __future__ import annotations

import random
from collections import Counter
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

from training import corpus
from training.dedupe import near_duplicates, resembling, signature, similarity
from training.licences import permissive_expression, permissive_licence


def metadata(**fields: str | list[str]) -> Message:
    message = Message()
    for name, values in fields.items():
        for value in [values] if isinstance(values, str) else values:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    "expression",
    ["MIT", "Apache-2.0 OR BSD-2-Clause", "MIT OR GPL-3.0-only", "(MIT AND Zlib) OR LGPL-2.1", "mit",
     "BSD-3-Clause AND Apache-2.0 WITH LLVM-exception"],
)  # fmt: skip
def test_expressions_that_permissive_licences_can_meet(expression: str) -> None:
    assert permissive_expression(expression)


@pytest.mark.parametrize(
    "expression",
    ["", "MPL-2.0", "MPL-2.0 AND MIT", "GPL-3.0-only", "MIT AND", "(MIT", "MIT MIT", "LicenseRef-Proprietary",
     "Apache-2.0 WITH Commons-Clause"],
)  # fmt: skip
def test_other_expressions_are_refused(expression: str) -> None:
    assert not permissive_expression(expression)


def test_licences_from_older_metadata() -> None:
    bsd, mpl = (
        "License :: OSI Approved :: BSD License",
        "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)",
    )
    assert permissive_licence(metadata(Classifier=bsd)) == "BSD"
    assert permissive_licence(metadata(Classifier=[bsd, mpl])) is None
    assert permissive_licence(metadata(License="Apache 2.0 License")) == "Apache-2.0"
    assert permissive_licence(metadata(License="MPL-2.0", Classifier=bsd)) is None
    assert permissive_licence(metadata(License="NVIDIA Proprietary Software")) is None
    assert permissive_licence(metadata(License_Expression="GPL-2.0-only", Classifier=bsd)) is None
    assert permissive_licence(metadata()) is None


def code(names: str = "alpha beta gamma delta", lines: int = 40, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = names.split()
    body = "\n".join(f"    {draw.choice(words)} = {draw.choice(words)}({draw.choice(words)})" for _ in range(lines))
    return f'def made():\n    """Do it."""\n{body}\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (code(), None),
        ("x = 1\n", "smaller than 200 bytes"),
        (code() + "def broken(:\n", "does not parse"),
        (code() + f"text = '{'a' * 2000}'\n", "very long lines"),
        ("# This file was automatically generated.\n" + code(), "generated"),
        ("# Under the GNU General Public License.\n" + code(), "names other licence terms"),
        (code() + "end = '<|endoftext|>'\n", "holds the separator"),
        (code() + "table = [\n" + "    'word',\n" * 60 + "]\n", "mostly literals"),
        (code() + "table = [\n" + "    123456,\n" * 10 + "]\n" + code() + "x = 1" + "0" * 900, "mostly literals"),
        (code() + "# " + "é" * 500_000, "larger than 1 MB"),
    ],
)
def test_why_a_file_is_dropped(text: str, reason: str | None) -> None:
    assert corpus.why_dropped(text) == reason


def test_folders_that_are_not_read() -> None:
    assert corpus._skipped(("pip", "_vendor", "rich"))
    assert corpus._skipped(("package", "tests", "data"))
    assert not corpus._skipped(("torch", "utils", "data"))


def source(package: str, text: str, path: str = "module.py") -> corpus.SourceFile:
    return corpus.SourceFile(package, path, text, str(hash(text)), signature(text), path.startswith("test"))


def test_signatures_estimate_similarity() -> None:
    lines = [f"value_{number} = function_{number * 7}(argument_{number % 5})" for number in range(400)]
    whole, nearly, half = "\n".join(lines), "\n".join(lines[:380]), "\n".join(lines[:200])
    other = "\n".join(f"other_{line}" for line in lines)
    assert similarity(signature(whole), signature(whole.replace("\n", "\n\n"))) == 1.0
    assert similarity(signature(whole), signature(nearly)) == pytest.approx(0.95, abs=0.08)
    assert similarity(signature(whole), signature(half)) == pytest.approx(0.5, abs=0.15)
    assert similarity(signature(whole), signature(other)) < 0.4
    signatures = [signature(text) for text in (whole, other, nearly, half)]
    assert near_duplicates(signatures, 0.8) == {2: 0}
    assert resembling(signatures[:1], signatures[1:], 0.35) == {1, 2}
    assert signature("").dtype == np.uint32


def test_held_out_packages_stay_out_of_training() -> None:
    held_out = corpus.HELD_OUT[0]
    packages = {name: corpus.Package(name, "1", "MIT") for name in (held_out, "copies", "own")}
    shared, benchmark = code(seed=1), code(seed=2) + "# separate those groups into separate strings and return\n"
    files = [
        source("copies", shared.replace("    ", "  ")),
        source("copies", code("one two three four", seed=3)),
        source("own", code("five six seven eight", seed=4)),
        source("own", benchmark),
        source("own", code("five six seven eight", seed=4) + "# end\n", "other.py"),
        source(held_out, shared),
    ]
    dropped: Counter[str] = Counter()
    forbidden = corpus.benchmark_lines(["x\n  # separate those groups into   separate strings and return\n"])
    made = corpus.assemble(packages, files, dropped, forbidden)
    assert [file.package for file in made.held_out] == [held_out]
    assert sorted(file.package for file in made.train) == ["copies", "own"]
    assert {name: one.split for name, one in made.packages.items()} == {
        held_out: "held-out", "copies": "train", "own": "train"
    }  # fmt: skip
    assert +dropped == {"holds benchmark text": 1, "near-duplicate": 2}


def test_a_package_gives_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PACKAGE_CAP_BYTES", 10_000)
    names = "a{0} b{0} c{0} d{0} e{0} f{0} g{0}"
    paths = [f"module_{seed}.py" for seed in range(20)] + [f"test_{seed}.py" for seed in range(20, 40)]
    files = [source("own", code(names.format(seed), seed=seed), path) for seed, path in enumerate(paths)]
    made = corpus.assemble({"own": corpus.Package("own", "1", "MIT")}, files, Counter(), frozenset())
    assert 5_000 < sum(file.size_bytes for file in made.train) <= 10_000
    assert sum(file.size_bytes for file in made.train if file.is_test) <= 2_500


def test_function_documents_carry_the_imports_that_they_use() -> None:
    text = (
        "import math\nimport os\nfrom . import near\n\n\n"
        'def first(x):\n    """One."""\n    y = math.sin(x)\n    y += 1\n    y += near.x\n    return y\n\n\n'
        'def short(x):\n    """Two."""\n\n\n    return x\n\n\n'
        "def bare(x):\n    return x\n"
    )
    documents = corpus.function_documents(text, "seed")
    assert "".join(documents).count("def ") == 2
    assert documents[0].startswith("import math\n\n\ndef first(x):\n")
    assert "os" not in documents[0].split()
    assert ["def short" in one for one in corpus.function_documents(text, "seed", long_bodies=True)] == [False]


def test_a_corpus_of_a_few_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("first", "second", corpus.HELD_OUT[0])
    packages = {name: corpus.Package(name, "1", "MIT") for name in names}
    entries = []
    for number, (name, words) in enumerate(zip(names, ("alpha beta gamma", "one two three", "red green blue"))):
        file = tmp_path / f"{name}.py"
        file.write_text(code(words, seed=number))
        entries.append((name, file.name, file))
    monkeypatch.setattr(corpus, "installed_sources", lambda: (packages, entries, []))
    made = corpus.build(tmp_path / "work", [], 1, ["first", corpus.HELD_OUT[0]])
    assert ([file.package for file in made.train], +made.dropped) == (["first"], {})
    assert [file.package for file in made.held_out] == [corpus.HELD_OUT[0]]
    with pytest.raises(ValueError, match="third"):
        corpus.build(tmp_path / "work", [], 1, ["third"])
