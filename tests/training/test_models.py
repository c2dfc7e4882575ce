"""Tokenizer, model, sampler, training step and measures, on models too small to know anything."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from training import evaluate
from training.data import Packed
from training.distill import distillation_objective, endless_rows, plain_objective
from training.export import read_model, write_model
from training.model import SSM, TARGET, Llama, Memory, Sizes, parameter_count
from training.optimizer import orthogonal
from training.sample import continuations
from training.tokenizer import encode_files, save_tokenizer, train_tokenizer
from training.train import Recipe, cross_entropy, divergence, schedule, train

CPU = torch.device("cpu")
TINY = Sizes(32, 16, 2, 1, 2, 48, vocab_size=300, max_position_embeddings=64)
TEXTS = [f"def name_{number}(x):\n    return x + {number}\n" for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, TINY.vocab_size)


@pytest.fixture
def model() -> Llama:
    torch.manual_seed(0)
    made = Llama(TINY)
    for weight in made.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    return made.eval()


def test_sizes_are_within_their_limits() -> None:
    assert 10_000_000 <= parameter_count(Llama(TARGET)) <= 12_000_000
    assert parameter_count(Llama(SSM)) <= 1_500_000


def test_every_byte_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x250))) + " \t\r\n\n  漢字 🙂\n    x = 1234\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert {bytes([byte]).decode("latin-1") for byte in range(33, 127)} <= set(tokenizer.get_vocab())


def test_a_prompt_has_the_same_tokens_alone_as_with_its_continuation(tokenizer: Tokenizer) -> None:
    prompt = 'def f(x):\n    """Doc.\n    """\n'
    alone = tokenizer.encode(prompt).ids
    assert tokenizer.encode(prompt + "    return x\n").ids[: len(alone)] == alone


def test_packed_rows_hold_every_document_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents, tokens = encode_files(tokenizer, TEXTS, tmp_path / "texts")
    packed = Packed((tmp_path / "texts", tmp_path / "texts"), CPU)
    assert (documents, len(packed)) == (len(TEXTS), 2 * tokens)
    stream = packed.epoch(seed=3)
    pieces = np.split(stream.numpy(), np.flatnonzero(stream.numpy() == 0))[1:]
    decoded = [tokenizer.decode(piece[1:].tolist()) for piece in pieces]
    assert sorted(decoded) == sorted(TEXTS * 2)
    assert decoded != TEXTS * 2
    inputs, targets = next(packed.batches(3, 16))
    assert inputs[:, 0].tolist() == [0, 0, 0]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert packed.prefixes(4, 8, torch.Generator().manual_seed(0))[:, 0].tolist() == [0] * 4


def test_memory_gives_the_same_logits(model: Llama) -> None:
    ids = torch.randint(0, 300, (3, 20))
    memory = Memory(TINY, 3, 20, CPU, torch.float32)
    steps = [model(ids[:, :12], memory)] + [model(ids[:, place : place + 1], memory) for place in range(12, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids), atol=1e-5, rtol=1e-5)


def test_transformers_computes_the_same_model(tmp_path: Path, model: Llama, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    write_model(model, tmp_path)
    save_tokenizer(tokenizer, tmp_path, 64)
    read = read_model(tmp_path, CPU)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(read(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert fast("x = 1\n").input_ids == tokenizer.encode("x = 1\n").ids
    assert (fast.bos_token_id, fast.eos_token_id) == (0, 0)


def test_greedy_rows_follow_the_argmax_and_warm_rows_differ(model: Llama) -> None:
    prefixes = torch.randint(0, 300, (4, 6))
    temperature = torch.tensor([0.0, 0.0, 3.0, 3.0])
    ids = continuations(model, prefixes, 8, temperature, torch.Generator().manual_seed(0))
    best = model(ids)[:, 5:-1].argmax(-1)
    assert torch.equal(ids[:2, 6:], best[:2])
    assert not torch.equal(ids[2:, 6:], best[2:])


def test_orthogonal_flattens_singular_values() -> None:
    for shape in ((2, 24, 48), (2, 48, 24)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.4


def test_schedule_rises_holds_and_falls_to_zero() -> None:
    factors = [schedule(step, 100, 0.1, 0.3) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == 1.0
    assert factors[29] == 1.0
    assert factors[-1] < 0.02
    assert all(one >= other for one, other in itertools.pairwise(factors[30:]))


def test_weights_choose_positions() -> None:
    logits, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    targets = torch.randint(0, 7, (2, 5))
    first = torch.zeros(2, 5)
    first[:, 0] = 2.0
    for loss, aim in ((cross_entropy, targets), (divergence, teacher)):
        torch.testing.assert_close(loss(logits, aim, torch.ones(2, 5)), loss(logits, aim))
        torch.testing.assert_close(loss(logits, aim, first), loss(logits[:, :1], aim[:, :1]))
    assert divergence(logits, logits).item() == pytest.approx(0.0, abs=1e-6)


def test_training_and_distillation_lower_their_losses(tmp_path: Path, tokenizer: Tokenizer) -> None:
    encode_files(tokenizer, TEXTS, tmp_path / "texts")
    packed = Packed((tmp_path / "texts",), CPU)
    torch.manual_seed(0)
    teacher, student = Llama(TINY), Llama(TINY)
    recipe = Recipe(matrix_lr=0.02, other_lr=0.01, steps=25)
    seen: list[int] = []
    objective = plain_objective(teacher, packed.batches(4, 32), CPU)
    run = train(teacher, objective, recipe, lambda _: None, seen.append, checkpoint_every=10)
    assert run.losses[-1][1] < run.losses[0][1] - 1.0
    assert seen == [10, 20]
    rows = continuations(teacher, packed.prefixes(8, 8, torch.Generator().manual_seed(0)), 24, 1.0)
    objective = distillation_objective(student, teacher, packed.batches(4, 32), endless_rows(rows, 4), CPU)
    before = evaluate.acceptance(teacher, student, rows, 8)[0]
    run = train(student, objective, recipe, lambda _: None)
    assert run.losses[-1][1] < run.losses[0][1] / 2
    assert evaluate.acceptance(teacher, student, rows, 8)[0] > before
    assert evaluate.acceptance(teacher, teacher, rows, 8) == (pytest.approx(1.0, abs=1e-4), 1.0)


def test_bits_count_each_token_and_the_end_once(model: Llama, tokenizer: Tokenizer) -> None:
    texts = [TEXTS[0], "".join(TEXTS[:6])]
    ids = torch.tensor([[*tokenizer.encode(texts[0]).ids, 0]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    window = ids.shape[1] - 1
    assert len(tokenizer.encode(texts[1]).ids) > 2 * window
    bits = evaluate.bits_of_files(model, tokenizer, texts, window=window)
    assert bits[0] == pytest.approx(nats / math.log(2), rel=1e-5)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()  # every token equally likely: bits are a count of tokens
    counted = evaluate.bits_of_files(model, tokenizer, texts, window=window)
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    assert counted == pytest.approx([length * math.log2(300) for length in lengths], rel=1e-5)


def test_reports_are_complete(model: Llama, tokenizer: Tokenizer) -> None:
    held_out = evaluate.held_out_report(model, tokenizer, [("a", TEXTS[0]), ("b", TEXTS[1]), ("a", TEXTS[2])])
    assert held_out["bytes"] == sum(len(TEXTS[index]) for index in range(3))
    smaller = min(held_out["xz_bits_per_byte_one_stream"], held_out["xz_bits_per_byte_one_stream_per_package"])
    assert held_out["ratio_to_smaller_xz"] == pytest.approx(held_out["model_bits_per_byte"] / smaller)
    completions = evaluate.completion_report(model, tokenizer, [("one", "def f(x):\n")], count=5)
    assert (completions["tasks"], completions["tokens"], len(completions["completions"])) == (1, 5, 1)
    accepted = evaluate.acceptance_report(model, {"same": model}, torch.randint(0, 300, (2, 8)), count=4)
    assert accepted["same"]["greedy_agreement"] == 1.0
