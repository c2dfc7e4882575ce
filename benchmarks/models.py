"""The models that benchmarks run: the embedded one (or a stand-in of its shape), and Transformers beside it.

Knows checkpoints and Transformers' best plain settings. It must not know what is measured.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ridgeline.models.checkpoint import embedded_model

EMBEDDED_SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 2048,
}
TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def checkpoint(given: Path | None) -> tuple[Path, str]:
    """(directory, what it is): the given one, the embedded one, or random weights of its shape."""
    if given is not None:
        return given, str(given)
    home = embedded_model()
    if (home / "config.json").is_file():
        return home, "embedded model"
    return random_checkpoint(EMBEDDED_SHAPE), "stand-in: random weights of the embedded model's shape"


def random_checkpoint(shape: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Llama checkpoint with random weights and a byte tokenizer, in a folder that goes with this process."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(prefix="ridgeline-stand-in-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(seed)
    config = LlamaConfig(**{"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": None, **shape})
    config.eos_token_id = None
    model: Any = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.to(dtype).save_pretrained(folder)
    _write_byte_tokenizer(folder)
    return folder


def _write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def vocabulary_of(folder: Path) -> int:
    """Ids that a prompt may hold."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


@dataclass(frozen=True)
class Tokens:
    """One generation: its ids and when each was known, in seconds after the call (first_s is stamps[0])."""

    ids: list[int]
    stamps: list[float]
    whole_s: float

    @property
    def decode_s(self) -> float:
        """Mean seconds a token after the first."""
        return (self.stamps[-1] - self.stamps[0]) / (len(self.stamps) - 1)


class Reference:
    """Transformers at its best plain settings: sdpa attention, KV cache, inference mode, greedy without processors."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        )
        self.model.eval()
        defaults = self.model.generation_config
        defaults.eos_token_id = defaults.bos_token_id = None
        defaults.pad_token_id = 0

    def _settings(self, new: int) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], new: int) -> Tokens:
        """`generate` for one prompt, each token's time read by a streamer (its own hook, microseconds)."""
        start = time.perf_counter()
        seen = _Stamps(start)
        ids = torch.tensor([list(prompt)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=self._settings(new), streamer=seen
        )
        whole = time.perf_counter() - start
        generated = out[0, len(prompt) :].tolist()
        assert len(generated) == new == len(seen.stamps), "Transformers stopped early"
        return Tokens(generated, seen.stamps, whole)

    @torch.inference_mode()
    def forward_loop(self, prompt: Sequence[int], new: int) -> Tokens:
        """The least that Transformers can do: its forward and its cache in a bare greedy loop, no `generate`."""
        from transformers import DynamicCache

        start = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
        ids = torch.tensor([list(prompt)])
        generated: list[int] = []
        stamps: list[float] = []
        for _ in range(new):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            generated.append(int(ids))
            stamps.append(time.perf_counter() - start)
        return Tokens(generated, stamps, stamps[-1])

    @torch.inference_mode()
    def generate_padded(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[list[int]]:
        """One left-padded batch, run until its longest output; each row cut to the length it asked for."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        out = self.model.generate(ids, attention_mask=mask, generation_config=self._settings(max(outputs)))
        return [row[width : width + new] for row, new in zip(out.tolist(), outputs)]

    def generate_grouped(
        self, prompts: Sequence[Sequence[int]], outputs: Sequence[int], order: Sequence[int], size: int
    ) -> list[list[int]]:
        """The same in batches of `size`, filled in the given order."""
        results: dict[int, list[int]] = {}
        for first in range(0, len(order), size):
            group = order[first : first + size]
            rows = self.generate_padded([prompts[one] for one in group], [outputs[one] for one in group])
            results.update(zip(group, rows))
        return [results[place] for place in range(len(prompts))]


class _Stamps:
    """A streamer for `generate` that only notes when each token came."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.stamps: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.stamps.append(time.perf_counter() - self.start)

    def end(self) -> None: ...
