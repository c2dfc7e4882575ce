"""Where parameters live, and how a checkpoint's tensors find them.

A model under construction asks the Store for matrices and vectors under the checkpoint's own names;
loading then is one pass over the files, each tensor copied straight into its place. Knows safetensors
and names. It must not know what a layer computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ridgeline.core.errors import CheckpointError, UnsupportedModel
from ridgeline.ops.weight import Weight

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
SHOWN_NAMES = 1000
"""Of a checkpoint that does not fit, so many names of a kind are listed: all, unless there are very many."""


class Store:
    """All parameters of a model on one device, in one dtype.

    places: checkpoint name -> the view that the tensor is copied into. matrices: every Weight, so that
    they can be repacked once loaded. Parameters are empty until `load_checkpoint` or `fill_random`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.places: dict[str, torch.Tensor] = {}
        self.matrices: list[Weight] = []
        self.aliases: set[str] = set()

    def matrix(self, parts: Sequence[tuple[str, int]], inputs: int) -> Weight:
        """One [sum of rows, inputs] matrix stacked from checkpoint tensors (name, rows)."""
        data = self._empty(sum(rows for _, rows in parts), inputs)
        self._place(data, parts)
        weight = Weight.dense_from(data)
        self.matrices.append(weight)
        return weight

    def plain_matrix(self, name: str, rows: int, inputs: int) -> torch.Tensor:
        """One [rows, inputs] matrix that is never repacked."""
        data = self._empty(rows, inputs)
        self._place(data, [(name, rows)])
        return data

    def vector(self, parts: Sequence[tuple[str, int]]) -> torch.Tensor:
        """One vector stacked from checkpoint tensors (name, length)."""
        data = self._empty(sum(length for _, length in parts))
        self._place(data, parts)
        return data

    def experts(self, names: Callable[[int], Sequence[tuple[str, int]]], count: int, inputs: int) -> torch.Tensor:
        """[count, rows, inputs] stacked from the tensors (name, rows) of each expert."""
        data = self._empty(count, sum(rows for _, rows in names(0)), inputs)
        for expert in range(count):
            self._place(data[expert], names(expert))
        return data

    def alias(self, name: str) -> None:
        """A checkpoint name that may be there and is not read (an output projection tied to the embedding)."""
        self.aliases.add(name)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def _place(self, data: torch.Tensor, parts: Sequence[tuple[str, int]]) -> None:
        start = 0
        for name, rows in parts:
            assert name not in self.places, f"{name} has a place already"
            self.places[name] = data[start : start + rows]
            start += rows

    @property
    def parameters(self) -> int:
        """Elements of all parameters; a tied matrix counts once."""
        return sum(place.numel() for place in self.places.values())

    @property
    def nbytes(self) -> int:
        return sum(place.numel() * place.element_size() for place in self.places.values())

    def fill_random(self, seed: int = 0) -> None:
        """Dummy weights made on the device: matrices ~ N(0, 1 / inputs), vectors near one (norms) or zero."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, place in self.places.items():
            if place.dim() == 2:
                place.normal_(0.0, 1.0 / math.sqrt(place.shape[1]), generator=generator)
            elif name.endswith("bias"):
                place.normal_(0.0, 0.02, generator=generator)
            else:
                place.normal_(1.0, 0.02, generator=generator)

    def release_places(self) -> None:
        """Forget the checkpoint's views, once loaded, so that repacked matrices free their first copy."""
        self.places = {
            name: torch.empty(place.shape, dtype=place.dtype, device="meta") for name, place in self.places.items()
        }


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: by its index, else model.safetensors, else all that are there.

    Some repositories hold the same weights a second time under another layout (consolidated.safetensors).
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a valid index ({error!r})") from None
        lost = [name for name in names if not (directory / name).is_file()]
        if lost:
            raise CheckpointError(f"{directory}: files named by the index are missing: {', '.join(lost)}")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if files:
        return files
    other = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in directory.glob(pattern))
    if other:
        raise UnsupportedModel(
            f"{directory}: only safetensors weights are read, found {', '.join(other[:3])}; pickled files can run "
            "code when opened: convert them with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{directory}: no safetensors files; to run a bare config.json use load_format='dummy'")


def load_checkpoint(store: Store, directory: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Copy every tensor of the checkpoint into its place.

    Files are mapped, not read into memory first. progress(done, total) counts tensors.
    Raises CheckpointError that lists, by name, all missing, unexpected and wrongly shaped tensors.
    """
    missing = dict(store.places)
    unexpected: list[str] = []
    shapes: list[str] = []
    total = len(missing)
    for name, shape, read in _tensors(weight_files(directory)):
        place = missing.pop(name, None)
        if place is None:
            if name not in store.aliases and not name.endswith(IGNORED_SUFFIXES):
                unexpected.append(name)
        elif tuple(place.shape) != shape:
            shapes.append(f"{name} is {list(shape)}, the config makes it {list(place.shape)}")
        elif not shapes:
            place.copy_(read())
            if progress is not None:
                progress(total - len(missing), total)
    problems = [
        _listed("missing", sorted(missing)),
        _listed("unexpected", unexpected),
        _listed("of the wrong shape", shapes),
    ]
    if any(problems):
        raise CheckpointError(
            f"{directory}: the checkpoint does not fit its config.json: " + "; ".join(filter(None, problems))
        )


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"{len(names)} tensors {what}: {', '.join(names[:SHOWN_NAMES])}{more}"


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    seen: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in seen:
                        raise CheckpointError(f"{file}: {name} is in {seen[name].name} as well")
                    seen[name] = file
                    yield name, tuple(opened.get_slice(name).get_shape()), partial(opened.get_tensor, name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or truncated safetensors file ({error})") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
