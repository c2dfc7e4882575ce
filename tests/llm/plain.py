"""The tiny Llama and the choice of a token, written down once more in plain torch, without ridgeline's model or run.

Only the noise is ridgeline's: `gumbel(seed, position)`, whose own test is with the op.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ridgeline import SamplingParams
from ridgeline.ops.sample import gumbel


class Plain:
    """logits(ids): [T, V], the whole sequence at once."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = load_file(str(directory / "model.safetensors"))

    def weight(self, name: str) -> torch.Tensor:
        return self.tensors[f"{name}.weight"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.weight(name)

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, H, D], halves rotated against each other."""
        tokens, _, dim = x.shape
        frequency = self.config["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.arange(tokens)[:, None, None] * frequency
        low, high = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        tokens = len(ids)
        x = self.weight("model.embed_tokens")[list(ids)]
        causal = torch.ones(tokens, tokens).tril().log()
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")
            q, k, v = (h @ self.weight(f"{name}self_attn.{part}_proj").T for part in "qkv")
            q, k, v = q.view(tokens, heads, -1), k.view(tokens, kv_heads, -1), v.view(tokens, kv_heads, -1)
            k, v = (one.repeat_interleave(heads // kv_heads, 1) for one in (self.rope(k), v))
            scores = torch.einsum("qhd,khd->hqk", self.rope(q), k) / q.shape[-1] ** 0.5 + causal
            attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + attended @ self.weight(name + "self_attn.o_proj").T
            h = self.norm(x, name + "post_attention_layernorm")
            gate, up = (h @ self.weight(f"{name}mlp.{part}_proj").T for part in ("gate", "up"))
            x = x + (torch.nn.functional.silu(gate) * up) @ self.weight(name + "mlp.down_proj").T
        return self.norm(x, "model.norm") @ self.weight("lm_head").T

    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        return self.logits(ids).log_softmax(-1)


def scores(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], seed: int
) -> torch.Tensor:
    """What the token behind prompt + output is the largest of: [V], from that position's logits."""
    logits = logits.clone()
    for token in {*prompt, *output}:
        value = logits[token]
        logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        times = list(output).count(token)
        logits[token] -= params.frequency_penalty * times + params.presence_penalty * (times > 0)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if params.temperature == 0:
        return logits
    logits = logits / params.temperature
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if params.top_k > 0:
        allowed &= logits >= logits.topk(params.top_k).values[-1]
    if params.top_p < 1:
        probabilities = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        total = 0.0
        for token in probabilities.argsort(descending=True).tolist():
            if total >= params.top_p:
                allowed[token] = False
            total += float(probabilities[token])
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        allowed &= probabilities >= params.min_p * probabilities.max()
    position = len(prompt) + len(output)
    noise = gumbel(torch.tensor([seed]), torch.tensor([position]), logits.numel())[0]
    return (logits + noise).masked_fill(~allowed, float("-inf"))
