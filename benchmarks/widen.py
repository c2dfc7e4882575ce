"""A small model in a large model's shape, with the same function: real text at a large model's cost.

    python -m benchmarks.widen --out DIR            # a Hugging Face checkpoint (16 GB for the default shape)
    llm = benchmarks.widen.load(shape, device="cuda")   # the same, filled on the device, nothing on disk

Random weights of a large shape write no text: they accept no drafts, share no structure, end nowhere.
Widening keeps what the embedded model says and makes each step
cost what an 8B step costs. How every tensor is made:

residual stream  The first `hidden` dimensions are the original's, the others stay exactly zero (but for
    MARK, below). RMSNorm then divides by a root mean square over more dimensions, smaller by
    sqrt(old / new): norm weights times sqrt(256 / 4096) = 0.25 and eps / 16 undo that.
embedding        Columns beyond the original's are zero, so that they start zero.
q, k, v, gate, up, lm_head   Columns beyond the original's meet zeros: random. Rows of added heads and
    units: random.
o_proj, down_proj   The only ones that write to the residual stream: zero wherever they would write to an
    added dimension or read an added head or unit; all zero in added layers, which so do nothing.
heads            Query heads must keep their key-value head. If a group grows (more query heads to a
    key-value head), the original's come first in it; if it shrinks, key-value heads are repeated.
layers           The original's are spread evenly among the added ones.

Random means normal with the original tensor's standard deviation: zeros would draw less power and
flatter the clocks. With the default shape 30 % of the elements are zeros that cannot be avoided.

Ids beyond the original vocabulary are masked in the weights, so that any engine obeys, greedy or sampling,
without a mask of its own. One added dimension of the residual stream, MARK, holds a constant 2^-16 in every
embedding. Norm weights there are zero, so no layer sees it, except the final norm's, 2^36, which makes
2^22 / rms of it; lm_head has -2 to -4 there for added ids and zero for the others. So an added id's logit
is below -8e6 / rms, -8,000 at an rms of 1,000, and its probability is exactly zero. The constant adds 2^-32
to a sum of squares that is at least hidden * eps = 2.6e-3 (eps included): 1e-7 of it, which is less than
fp32 resolves. Needs fp32's exponent range, so fp32 or bf16. (Rows that are zero where the original acts would
have a logit of 0, which can win; rows made of convex combinations of the original's can never win, but
sampling would meet them.)

On the embedded model, whose logits reach 36, the fp32 logits of both differ by 4e-5, as fp32 and fp64 of the
original alone do (3.7e-5); in fp64, but for norms that stay in fp32, they differ by 2e-15.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.models import checkpoint
from benchmarks.record import progress
from ridgeline import LLM
from ridgeline.models.spec import read_config
from ridgeline.models.weights import weight_files

MARK_VALUE = 2.0**-16
MARK_GAIN = 2.0**36
MARK_HEAD = (-4.0, -2.0)
SHARD_BYTES = 4 << 30
LAYER = "model.layers."
SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")


@dataclass(frozen=True)
class Shape:
    """The shape to widen to; the default is Llama-3.1-8B's. The head dimension stays."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    layers: int = 32
    vocabulary: int = 128256


class Widening:
    """How each tensor of the wide model follows from the original's.

    config: the original's config.json; read(name) returns one of its tensors. Raises ValueError if the
    shape is too small to hold the original.
    """

    def __init__(self, config: Mapping[str, Any], read: Callable[[str], torch.Tensor], shape: Shape) -> None:
        if config.get("architectures") != ["LlamaForCausalLM"]:
            raise ValueError(f"only Llama checkpoints can be widened, not {config.get('architectures')}")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("a checkpoint with biases cannot be widened")
        self.config, self.read, self.shape = config, read, shape
        self.hidden = int(config["hidden_size"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_dim = int(config.get("head_dim") or self.hidden // self.heads)
        self.intermediate = int(config["intermediate_size"])
        self.layers = int(config["num_hidden_layers"])
        self.vocabulary = int(config["vocab_size"])
        for name in ("heads", "kv_heads", "intermediate", "layers", "vocabulary"):
            if getattr(shape, name) < getattr(self, name):
                raise ValueError(f"{name}: {getattr(shape, name)} is less than the original's {getattr(self, name)}")
        if shape.hidden <= self.hidden:
            raise ValueError(f"hidden: {shape.hidden} leaves no dimension beyond the original's {self.hidden}")
        if shape.heads % shape.kv_heads:
            raise ValueError(f"heads: {shape.heads} is not a multiple of kv_heads {shape.kv_heads}")
        self.mark = self.hidden
        self.norm_factor = math.sqrt(self.hidden / shape.hidden)
        self.q_places, self.kv_sources = self._heads()
        self.layer_sources = {place * shape.layers // self.layers: place for place in range(self.layers)}

    def _heads(self) -> tuple[list[int], list[int]]:
        """Where each original query head goes, and which original head each new key-value head repeats."""
        group, new_group = self.heads // self.kv_heads, self.shape.heads // self.shape.kv_heads
        repeats = -(-group // new_group)
        if self.kv_heads * repeats > self.shape.kv_heads:
            raise ValueError(
                f"kv_heads: groups of {new_group} query heads need {self.kv_heads * repeats}, not {self.shape.kv_heads}"
            )
        places = [
            (head // group * repeats + head % group // new_group) * new_group + head % group % new_group
            for head in range(self.heads)
        ]
        return places, [head // repeats for head in range(self.kv_heads * repeats)]

    def wide_config(self) -> dict[str, Any]:
        """config.json of the wide model."""
        shape = self.shape
        return {
            **self.config,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "vocab_size": shape.vocabulary,
            "rms_norm_eps": float(self.config.get("rms_norm_eps", 1e-6)) * self.hidden / shape.hidden,
            "tie_word_embeddings": False,
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the wide model's tensors, in the order of the layers."""
        shape = self.shape
        hidden, inner = shape.hidden, shape.intermediate
        q_rows, kv_rows = shape.heads * self.head_dim, shape.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
        for layer in range(shape.layers):
            prefix = f"{LAYER}{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "self_attn.q_proj.weight", (q_rows, hidden)
            yield prefix + "self_attn.k_proj.weight", (kv_rows, hidden)
            yield prefix + "self_attn.v_proj.weight", (kv_rows, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, q_rows)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (inner, hidden)
            yield prefix + "mlp.up_proj.weight", (inner, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (shape.vocabulary, hidden)

    def fill(self, name: str, out: torch.Tensor, generator: torch.Generator) -> None:
        """Write the wide tensor `name` into `out`, which lies on the generator's device, in any dtype."""
        source, layer = self._source(name)
        original = self.read(source).to(device=out.device, dtype=torch.float32)
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind.endswith("norm"):
            self._norm(out, original, layer, name == "model.norm.weight", generator)
            return
        out.normal_(0.0, float(original.std()), generator=generator)
        match kind:
            case "embed_tokens":
                out[: self.vocabulary, self.hidden :] = 0
                out[: self.vocabulary, : self.hidden] = original
                out[:, self.mark] = MARK_VALUE
            case "lm_head":
                out[: self.vocabulary, : self.hidden] = original
                out[:, self.mark].uniform_(*MARK_HEAD, generator=generator)
                out[: self.vocabulary, self.mark] = 0
            case "o_proj" | "down_proj":
                out.zero_()
                if layer is not None:
                    columns = self._columns(kind, out.device)
                    block = torch.zeros(self.hidden, out.shape[1], device=out.device)
                    block[:, columns] = original
                    out[: self.hidden] = block
            case _ if layer is not None:
                rows, chosen = self._rows(kind, original)
                out[rows, : self.hidden] = chosen.to(out.dtype)

    def _source(self, name: str) -> tuple[str, int | None]:
        """The original tensor that a wide one takes after, and its layer (None for an added layer)."""
        if name == "lm_head.weight" and self.config.get("tie_word_embeddings"):
            return "model.embed_tokens.weight", None
        if not name.startswith(LAYER):
            return name, None
        number, _, rest = name.removeprefix(LAYER).partition(".")
        layer = self.layer_sources.get(int(number))
        return f"{LAYER}{layer or 0}.{rest}", layer

    def _norm(
        self, out: torch.Tensor, original: torch.Tensor, layer: int | None, final: bool, generator: torch.Generator
    ) -> None:
        """Original weights times sqrt(old / new), then random ones of that size; MARK counts in the final one alone."""
        deviation = float(original.std()) if original.numel() > 1 else 0.0
        out.normal_(float(original.mean()), deviation, generator=generator)
        out.mul_(self.norm_factor)
        if layer is not None or final:
            out[: self.hidden] = original * self.norm_factor
        out[self.mark] = MARK_GAIN if final else 0.0

    def _columns(self, kind: str, device: torch.device) -> torch.Tensor:
        if kind == "down_proj":
            return torch.arange(self.intermediate, device=device)
        return _elements(self.q_places, self.head_dim).to(device)

    def _rows(self, kind: str, original: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the wide tensor and what they hold of the original."""
        if kind == "q_proj":
            return _elements(self.q_places, self.head_dim).to(original.device), original
        if kind in ("k_proj", "v_proj"):
            chosen = original[_elements(self.kv_sources, self.head_dim).to(original.device)]
            return torch.arange(chosen.shape[0], device=original.device), chosen
        return torch.arange(self.intermediate, device=original.device), original

    def zero_share(self) -> float:
        """Share of the wide model's elements that must be zero."""
        total = sum(math.prod(one) for _, one in self.shapes())
        writers = self.shape.hidden * (self.shape.heads * self.head_dim + self.shape.intermediate) * self.shape.layers
        kept = self.hidden * (self.heads * self.head_dim + self.intermediate) * self.layers
        return (writers - kept + self.vocabulary * (self.shape.hidden - self.hidden - 1)) / total


def _elements(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Indices of all elements of these heads, in order."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def open_original(source: Path) -> tuple[dict[str, Any], Callable[[str], torch.Tensor]]:
    """config.json of a checkpoint, and a reader of its tensors by name (one at a time)."""
    homes: dict[str, Path] = {}
    for file in weight_files(source):
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            homes.update(dict.fromkeys(opened.keys(), file))

    def read(name: str) -> torch.Tensor:
        with safe_open(str(homes[name]), framework="pt", device="cpu") as opened:
            return opened.get_tensor(name)

    return read_config(source), read


def widening(source: Path, shape: Shape) -> Widening:
    return Widening(*open_original(source), shape)


def write_checkpoint(
    source: Path, out: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> None:
    """A Hugging Face checkpoint of the wide model: shards, index, config, and the original's tokenizer."""
    plan = widening(source, shape)
    out.mkdir(parents=True, exist_ok=True)
    _copy_side_files(plan, source, out, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, size in plan.shapes():
        count = math.prod(size) * dtype.itemsize
        if groups[-1] and held + count > SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append((name, size))
        held += count
    index: dict[str, str] = {}
    total = 0
    bar = progress(sum(map(len, groups)))
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shard = {}
        for name, size in group:
            tensor = torch.empty(size, dtype=dtype, device=device)
            plan.fill(name, tensor, generator)
            shard[name] = tensor.cpu()
            index[name] = file
            total += tensor.numel() * tensor.element_size()
            bar.update(1)
        save_file(shard, str(out / file), metadata={"format": "pt"})
    bar.close()
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(shape: Shape, source: Path | None = None, seed: int = 0, **settings: Any) -> LLM:
    """An LLM with the wide model, its weights made in place on its device; settings are LLM's.

    On a CPU this needs kernels="reference" (other kernels repack matrices, and then nothing can be filled).
    Raises RuntimeError if the engine has repacked its weights.
    """
    source = source or checkpoint(None)[0]
    plan = widening(source, shape)
    with tempfile.TemporaryDirectory(prefix="ridgeline-widened-") as folder:
        _copy_side_files(plan, source, Path(folder), torch.bfloat16)
        llm = LLM(folder, load_format="dummy", **settings)
    fill_places(plan, llm.built.runner.model.store.places, seed)
    return llm


def fill_places(plan: Widening, places: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    """Write every wide tensor into its place (views of an engine's parameters, by checkpoint name)."""
    expected = dict(plan.shapes())
    if {name: tuple(place.shape) for name, place in places.items()} != expected:
        raise RuntimeError("the engine's parameters are not those of the wide model")
    if any(place.is_meta for place in places.values()):
        raise RuntimeError("the engine has repacked its matrices; use kernels='reference' on a CPU")
    generator = torch.Generator(next(iter(places.values())).device).manual_seed(seed)
    with torch.no_grad():
        for name in expected:
            plan.fill(name, places[name], generator)


def _copy_side_files(plan: Widening, source: Path, out: Path, dtype: torch.dtype) -> None:
    """The tokenizer and generation settings as they are, and the wide config."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.name != "model.safetensors.index.json":
                shutil.copyfile(file, out / file.name)
    config = {**plan.wide_config(), "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    default = Shape()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--model", type=Path, help="a Llama checkpoint instead of the embedded model")
    for option in ("hidden", "heads", "kv_heads", "intermediate", "layers"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(default, option))
    parser.add_argument("--vocab", type=int, default=default.vocabulary)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu", help="where random numbers are drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    shape = Shape(options.hidden, options.heads, options.kv_heads, options.intermediate, options.layers, options.vocab)
    source, what = checkpoint(options.model)
    write_checkpoint(source, options.out, shape, getattr(torch, options.dtype), options.device, options.seed)
    plan = widening(source, shape)
    print(f"{options.out}: {what} in the shape {shape}, {100 * plan.zero_share():.1f} % of the elements are zero")


if __name__ == "__main__":
    main()
