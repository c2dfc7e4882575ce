"""Schemas of strangers, compiled where it does not hurt: a process that may be killed at any time.

Knows grammars. It must not know who asks. One JSON line in ({"schema": …}), one out ({} or {"error", "complex"}).

Run as `python -m ridgeline.text.grammar_child DIRECTORY WIDTH MOST_BYTES`, of a tokenizer and its logits.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

from ridgeline.core.errors import InvalidArgument
from ridgeline.text.grammar import Grammars, GrammarTooComplex
from ridgeline.text.tokenizer import load_tokenizer


def main(directory: Path, width: int, most_bytes: int) -> None:
    """Answers until standard input ends. most_bytes: memory beyond what the process has when it is ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        return
    grammars = Grammars(tokenizer, width)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + most_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("{}", flush=True)
    for line in sys.stdin.buffer:
        answer: dict[str, object] = {}
        try:
            grammars.check(json.loads(line)["schema"])
        except InvalidArgument as error:
            answer = {"error": error.message, "complex": isinstance(error, GrammarTooComplex)}
        except (MemoryError, RecursionError):
            answer = {"error": "the schema takes too much memory", "complex": True}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
