"""Files that are made once on a machine and kept: machine code of kernels, whoever compiles it.

Knows folders and whole files. It must not know what the files hold, nor how they are named: a name says
everything that its content depends on, so a file is right for ever or not there.

The place is RIDGELINE_CACHE if that is set, else a folder beside the package if it can be written, else the
user's cache (XDG_CACHE_HOME).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

DIGEST_BYTES = 32


def places(beside: Path) -> Iterator[Path]:
    """Folders that may hold kept files, the first choice first; beside: the package's own."""
    given = os.environ.get("RIDGELINE_CACHE")
    if given:
        yield Path(given)
        return
    yield beside
    yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ridgeline"


def read(file: Path) -> bytes | None:
    """A kept file's content, if it is there and whole: those who load machine code trust what they are given."""
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        if hashlib.sha256(content[DIGEST_BYTES:]).digest() == content[:DIGEST_BYTES]:
            return content[DIGEST_BYTES:]
    return None


def write(file: Path, made: bytes) -> None:
    """Write a file behind its digest; several processes may do so at once. A full disk keeps nothing."""
    with contextlib.suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as written:
            written.write(hashlib.sha256(made).digest() + made)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
