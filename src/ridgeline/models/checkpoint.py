"""Where a model lies: the embedded one, a directory, a bare config.json, or a repository on the hub.

Knows paths and huggingface_hub. It must not know what is inside the files.
"""

from __future__ import annotations

import difflib
import os
import re
from importlib import resources
from pathlib import Path

from ridgeline.core.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
HUB_LEFT_OUT = ("*/*", "consolidated*")
"""Folders with other formats, and weights a second time under another layout."""


def embedded_model(name: str = "model") -> Path:
    """Directory of a model that ships with ridgeline: "model" or "ssm"."""
    return Path(str(resources.files("ridgeline") / "assets" / name))


def locate(model: str | os.PathLike[str] | None, revision: str | None = None, weights: bool = True) -> Path:
    """The directory (or the config.json) of a model. weights: whether they are wanted; if not, none are fetched.

    None is the embedded model. A name that is no path is taken as a hub repository; HF_HUB_OFFLINE and
    the hub's cache are respected. Raises CheckpointError naming what was looked for and where.
    """
    if model is None:
        return embedded_model()
    path = Path(model)
    if path.exists():
        if path.is_dir() or path.suffix == ".json":
            return path
        raise CheckpointError(f"{path}: not a checkpoint; give its directory, a config.json or a hub id")
    name = os.fspath(model)
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such directory, and not the id of a hub repository{_near(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        wanted, unwanted = list(HUB_FILES if weights else ("config.json",)), list(HUB_LEFT_OUT)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such directory, and no such repository on the hub{_near(path)}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: no such directory, not in the hub's cache, and the hub cannot be reached "
            f"(HF_HUB_OFFLINE set, or no network){_near(path)}"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{name}: no such directory, and the hub refused: {error}") from None


def _near(path: Path) -> str:
    """What lies beside a path that is not there and is called nearly the same, as a question; empty if nothing does."""
    try:
        beside = [one.name for one in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
