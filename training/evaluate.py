"""Measures the models: bits per byte of held-out text, completions that parse, acceptance of the small model.

Knows texts, a tokenizer and models. Every number of the model card comes from here. Knows nothing of training.
"""

from __future__ import annotations

import ast
import json
import lzma
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from tokenizers import Tokenizer
from torch import Tensor

from training.model import Llama
from training.sample import continuations

_ALLOW_INCOMPLETE_INPUT = 0x4000  # ast.PyCF_ALLOW_INCOMPLETE_INPUT, which the standard `codeop` uses
SEPARATOR_ID = 0


@dataclass(frozen=True)
class Parse:
    """How a completion fared: whether it counts, how many of its lines were kept, and why it does not count."""

    ok: bool
    kept_lines: int
    reason: str


def _parses(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _is_unfinished(source: str) -> bool:
    """Whether `source` is free of errors up to its end and only lacks what should come next."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<completion>", "exec", ast.PyCF_ONLY_AST | _ALLOW_INCOMPLETE_INPUT)
    except SyntaxError as error:
        return "incomplete input" in str(error)
    except (ValueError, RecursionError, MemoryError):
        return False
    return False


def completion_parses(prompt: str, completion: str, ended: bool = False) -> Parse:
    """Judges a completion cut to the last line that ends a statement.

    A last line without a line end is dropped, unless the model itself `ended` there. If the rest parses below the
    prompt, all of it is kept. If it is merely unfinished (an open bracket, string, block or decorator at its very end),
    lines are cut from the end until what remains parses, which removes that one unfinished statement and nothing else.
    An error anywhere before the end is a failure: it is never cut away. So are fewer than two kept lines that are not
    blank.
    """
    lines = completion.split("\n")
    tail = lines.pop()
    complete = [line + "\n" for line in lines]
    if ended and tail:
        complete.append(tail + "\n")
    whole = prompt + "".join(complete)
    if not _parses(whole):
        if not _is_unfinished(whole):
            return Parse(False, 0, "syntax error")
        while complete and not _parses(prompt + "".join(complete)):
            complete.pop()
    kept = sum(1 for line in complete if line.strip())
    if kept < 2:
        return Parse(False, kept, "fewer than two lines")
    return Parse(True, kept, "")


@torch.no_grad()
def greedy_completions(
    model: Llama, tokenizer: Tokenizer, prompts: Iterable[str], count: int
) -> list[tuple[str, bool]]:
    """Greedy continuation of each prompt by `count` tokens, cut at the separator: (text, whether it ended)."""
    device = model.model.embed_tokens.weight.device
    results = []
    for prompt in prompts:
        known = tokenizer.encode(prompt).ids
        made = continuations(model, torch.tensor([known], device=device), count, 0.0)[0, len(known) :].tolist()
        ended = SEPARATOR_ID in made
        text = tokenizer.decode(made[: made.index(SEPARATOR_ID)] if ended else made, skip_special_tokens=False)
        results.append((text, ended))
    return results


@torch.no_grad()
def bits_of_files(
    model: Llama, tokenizer: Tokenizer, texts: Sequence[str], window: int = 2048, batch: int = 64
) -> list[float]:
    """Bits that the model needs for each text and for its end, with nothing but the text itself as context.

    Windows of `window` tokens advance by half; each token is scored once, with at least half a window before it
    where the text has that much.
    """
    device = model.model.embed_tokens.weight.device
    stride = window // 2
    pieces: list[tuple[int, list[int], list[int], int]] = []
    for index, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = [*encoding.ids, SEPARATOR_ID]
        scored = 0
        for first in range(0, len(ids) - 1, stride):
            inputs, targets = ids[first : first + window], ids[first + 1 : first + window + 1]
            inputs = inputs[: len(targets)]
            pieces.append((index, inputs, targets, scored - first))
            scored = first + len(targets)
            if scored >= len(ids) - 1:
                break
    pieces.sort(key=lambda piece: len(piece[1]))
    bits = [0.0] * len(texts)
    for start in range(0, len(pieces), batch):
        group = pieces[start : start + batch]
        width = max(len(inputs) for _, inputs, _, _ in group)
        known = torch.zeros(len(group), width, dtype=torch.int64)
        goals = torch.full((len(group), width), -100)
        for row, (_, inputs, targets, skip) in enumerate(group):
            known[row, : len(inputs)] = torch.tensor(inputs)
            goals[row, skip : len(targets)] = torch.tensor(targets[skip:])
        losses = functional.cross_entropy(
            model(known.to(device)).float().transpose(1, 2),
            goals.to(device),
            reduction="none",
            ignore_index=-100,
        )
        for (index, _, _, _), total in zip(group, losses.double().sum(1).tolist()):
            bits[index] += total / math.log(2)
    return bits


def xz_bytes(texts: Iterable[str]) -> int:
    """Bytes of `xz -9` on the texts laid end to end."""
    return len(lzma.compress("".join(texts).encode(), lzma.FORMAT_XZ, preset=9))


def held_out_report(model: Llama, tokenizer: Tokenizer, files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Bits per byte of held-out files, given as (package, text), beside those of xz -9 on the same bytes.

    xz is measured on one stream per package and on one stream of everything; the ratio is taken to the smaller.
    """
    bits = bits_of_files(model, tokenizer, [text for _, text in files])
    grouped: dict[str, list[int]] = defaultdict(list)
    for index, (package, _) in enumerate(files):
        grouped[package].append(index)
    packages = {}
    for package, indexes in sorted(grouped.items()):
        size = sum(len(files[index][1].encode()) for index in indexes)
        packages[package] = {
            "files": len(indexes),
            "bytes": size,
            "model_bits_per_byte": sum(bits[index] for index in indexes) / size,
            "xz_bits_per_byte": 8 * xz_bytes(files[index][1] for index in indexes) / size,
        }
    size = sum(len(text.encode()) for _, text in files)
    per_package = sum(one["xz_bits_per_byte"] * one["bytes"] for one in packages.values()) / size
    together = 8 * xz_bytes(files[index][1] for indexes in grouped.values() for index in indexes) / size
    model_bits = sum(bits) / size
    return {
        "bytes": size,
        "tokens": sum(len(encoding.ids) for encoding in tokenizer.encode_batch([text for _, text in files])),
        "model_bits_per_byte": model_bits,
        "xz_bits_per_byte_one_stream_per_package": per_package,
        "xz_bits_per_byte_one_stream": together,
        "ratio_to_smaller_xz": model_bits / min(per_package, together),
        "packages": packages,
    }


def completion_report(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[tuple[str, str]], count: int = 64
) -> dict[str, Any]:
    """Share of greedy completions, one for each (task, prompt), that parse as `completion_parses` judges."""
    completions = greedy_completions(model, tokenizer, [prompt for _, prompt in tasks], count)
    rows = []
    for (task, prompt), (text, ended) in zip(tasks, completions):
        verdict = completion_parses(prompt, text, ended)
        rows.append({"task": task, "ok": verdict.ok, "kept_lines": verdict.kept_lines, "reason": verdict.reason,
                     "ended": ended, "completion": text})  # fmt: skip
    passed = sum(row["ok"] is True for row in rows)
    return {
        "tasks": len(rows),
        "tokens": count,
        "parsed": passed,
        "rate": passed / len(rows),
        "completions": rows,
    }


@torch.no_grad()
def acceptance(target: Llama, small: Llama, rows: Tensor, known: int, batch: int = 64) -> tuple[float, float]:
    """Over the positions of rows [rows, tokens] after the first `known`: (mean of sum min(p, q), share of equal
    argmax), p and q being the distributions of target and small model at temperature 1.

    The first is the probability that one drafted token is accepted (Leviathan et al., 2023, theorem 3.5).
    """
    overlap, agreed, positions = 0.0, 0.0, 0
    for ids in rows.split(batch):
        p = target(ids)[:, known - 1 : -1].float().softmax(-1)
        q = small(ids)[:, known - 1 : -1].float().softmax(-1)
        overlap += torch.minimum(p, q).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        positions += p.shape[0] * p.shape[1]
    return overlap / positions, agreed / positions


def acceptance_report(
    target: Llama, small: dict[str, Llama], prefixes: Tensor, count: int = 128, seed: int = 3
) -> dict[str, Any]:
    """Acceptance of each small model on the target's own continuations of held-out `prefixes` [rows, tokens].

    `overlap_at_temperature_1` is measured on continuations drawn at temperature 1, `greedy_agreement` on greedy ones.
    """
    draw = torch.Generator(device=prefixes.device).manual_seed(seed)
    drawn = continuations(target, prefixes, count, 1.0, draw)
    greedy = continuations(target, prefixes, count, 0.0)
    known = prefixes.shape[1]
    report: dict[str, Any] = {"rows": len(prefixes), "prefix_tokens": known, "continued_tokens": count}
    for name, model in small.items():
        report[name] = {
            "overlap_at_temperature_1": acceptance(target, model, drawn, known)[0],
            "greedy_agreement": acceptance(target, model, greedy, known)[1],
        }
    return report


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """(task, prompt) of each row of a HumanEval file."""
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").split("\n") if row.strip()]
    return [(row["task_id"], row["prompt"]) for row in rows]
