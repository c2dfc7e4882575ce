"""Model families by architecture name, and how a config becomes a model.

Knows which families there are. It must not know engines or devices beyond passing them on.
"""

from __future__ import annotations

from types import ModuleType

import torch

from ridgeline.core.errors import UnsupportedModel
from ridgeline.models import llama, mistral, mixtral, opt, qwen2, qwen3, qwen3_moe
from ridgeline.models.decoder import Decoder
from ridgeline.models.spec import Fields, ModelSpec, architecture_of
from ridgeline.models.weights import Store
from ridgeline.ops.linear import ACTIVATIONS

FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family for family in (llama, mistral, qwen2, qwen3, mixtral, qwen3_moe, opt)
}

__all__ = ["FAMILIES", "Decoder", "ModelSpec", "build_model", "parse_config"]


def parse_config(values: dict[str, object], origin: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config.json. UnsupportedModel or CheckpointError if it cannot be run."""
    name = architecture_of(values, FAMILIES, origin)
    if values.get("quantization_config"):
        raise UnsupportedModel(f"{origin}: quantized weights (quantization_config) are not supported")
    spec = FAMILIES[name].spec(Fields(values, origin))
    if spec.activation not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{origin}: activation {spec.activation!r} is not supported; {', '.join(ACTIVATIONS)} are"
        )
    return spec


def build_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, max_positions: int) -> Decoder:
    """A model with empty parameters on `device` ("meta" costs nothing)."""
    names = FAMILIES[spec.architecture].NAMES
    return Decoder(spec, names, Store(device, dtype), max_positions)
