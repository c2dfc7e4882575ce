"""The command that remakes the embedded model: `python -m training.make all --prompts HUMAN_EVAL.jsonl`.

Knows the order of the stages, what each reads and writes in the work folder, and how much each may spend. Each stage
can be run alone; its numbers are added to `results.json`. How a stage does its work only the other modules know.
`boosting` stands for the stages that start from the models that ship and train others beside the small one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from training import boost, card, corpus, coverage, evaluate
from training.data import Packed
from training.distill import continue_corpus, distillation_objective, endless_rows, plain_objective
from training.export import read_model, write_model
from training.model import SSM, TARGET, Llama, Sizes, parameter_count
from training.tokenizer import VOCABULARY, encode_files, save_tokenizer, train_tokenizer
from training.train import Recipe, Run, train

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "src" / "ridgeline" / "assets"


def recorded(folder: Path) -> dict[str, Any]:
    """The numbers of all stages so far."""
    path = folder / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def record(folder: Path, key: str, content: Any) -> None:
    """Adds one stage's numbers to `results.json`."""
    (folder / "results.json").write_text(laid_out({**recorded(folder), key: content}) + "\n")


def laid_out(value: Any, levels: int = 5, indent: str = "") -> str:
    """JSON, one entry a line down to so many levels; what lies below them shares a line."""
    inner = indent + " "
    if levels and value and isinstance(value, dict):
        parts = [f"{inner}{json.dumps(str(key))}: {laid_out(one, levels - 1, inner)}" for key, one in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if levels and value and isinstance(value, list) and isinstance(value[0], dict):
        return "[\n" + ",\n".join(inner + laid_out(one, levels - 1, inner) for one in value) + f"\n{indent}]"
    return json.dumps(value)


def chosen_device() -> torch.device:
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prefer_attention(name: str) -> None:
    """Which of torch's fused attention kernels runs: "cudnn" pays for training, "flash" for steps of one token."""
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name != "cudnn")


def machine() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}"


def make_corpus(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    prompts = [prompt for _, prompt in evaluate.read_prompts(arguments.prompts)]
    corpus.build(arguments.work, prompts, arguments.workers, arguments.packages)
    listing = json.loads((arguments.work / "corpus.json").read_text())
    sizes = {key: listing[key] for key in ("files_read", "files_dropped", "files_kept", "bytes_kept")}
    record(arguments.work, "corpus", {**sizes, "seconds": time.perf_counter() - start})
    print(json.dumps(sizes))


def make_tokenizer(arguments: argparse.Namespace) -> None:
    """Trains on a sample of the training files (whole files, drawn evenly) and encodes both splits."""
    start = time.perf_counter()
    work = arguments.work
    texts = [row["text"] for row in corpus.read_texts(work / "train.jsonl")]
    sample = random.Random(0).sample(texts, len(texts))
    total, limit = 0, arguments.tokenizer_bytes
    chosen = []
    for text in sample:
        if total < limit:
            chosen.append(text)
            total += len(text.encode())
    tokenizer = train_tokenizer(chosen, arguments.vocabulary)
    save_tokenizer(tokenizer, work / "tokenizer", TARGET.max_position_embeddings)
    counts: dict[str, Any] = {"trained_on_bytes": total, "vocabulary": tokenizer.get_vocab_size()}
    counts |= _encode(tokenizer, work)
    record(work, "tokenizer", {**counts, "seconds": time.perf_counter() - start})
    print(json.dumps(counts))


def _encode(tokenizer: Tokenizer, work: Path) -> dict[str, Any]:
    """Writes the token files of all splits; their sizes."""
    counts: dict[str, Any] = {}
    for name in ("train", "functions", "bodies", "held_out"):
        rows = [row["text"] for row in corpus.read_texts(work / f"{name}.jsonl")]
        documents, tokens = encode_files(tokenizer, rows, work / name)
        size = sum(len(row.encode()) for row in rows)
        counts[name] = {"documents": documents, "tokens": tokens, "bytes_per_token": size / tokens}
    return counts


def _summary(model: Llama, run: Run, tokens_per_step: int, recipe: Recipe, started: float) -> dict[str, Any]:
    return {
        "sizes": model.sizes.as_dict(),
        "parameters": parameter_count(model),
        "steps": run.steps,
        "tokens_per_step": tokens_per_step,
        "tokens_seen": run.steps * tokens_per_step,
        "training_seconds": run.seconds,
        "stage_seconds": time.perf_counter() - started,
        "matrix_lr": recipe.matrix_lr,
        "other_lr": recipe.other_lr,
        "weight_decay": recipe.weight_decay,
        "warmup": recipe.warmup,
        "hold": recipe.hold,
        "final_loss_nats": run.losses[-1][1],
        "losses": run.losses,
        "machine": machine(),
    }


def make_target(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    device, work = chosen_device(), arguments.work
    prefer_attention(arguments.attention)
    torch.manual_seed(0)
    model = Llama(arguments.target_sizes).to(device)
    packed = Packed((work / "train", work / "functions"), device)
    batches = packed.batches(arguments.rows, arguments.row_tokens)
    recipe = Recipe(
        matrix_lr=arguments.matrix_lr,
        other_lr=arguments.other_lr,
        budget_s=arguments.target_seconds,
        steps=arguments.target_steps,
    )
    run = train(
        model,
        plain_objective(model, batches, device),
        recipe,
        report=partial(print, "target", flush=True),
        checkpoint=lambda _: write_model(model, work / "target"),
    )
    write_model(model, work / "target")
    summary = _summary(model, run, arguments.rows * arguments.row_tokens, recipe, started)
    record(work, "target", {**summary, "epoch_tokens": len(packed)})


def make_tuning(arguments: argparse.Namespace) -> None:
    """Goes on with the target for a while, at lower rates, on the corpus and functions with long bodies."""
    started = time.perf_counter()
    device, work = chosen_device(), arguments.work
    prefer_attention(arguments.attention)
    model = read_model(work / "target", device).requires_grad_(True).train()
    packed = Packed((work / "train", *[work / "bodies"] * arguments.tuning_repeats), device)
    recipe = Recipe(
        matrix_lr=arguments.matrix_lr * arguments.tuning_rate,
        other_lr=arguments.other_lr * arguments.tuning_rate,
        warmup=0.02,
        hold=0.02,
        budget_s=arguments.tuning_seconds,
        steps=arguments.tuning_steps,
    )
    objective = plain_objective(model, packed.batches(arguments.rows, arguments.row_tokens, 1000), device)
    run = train(model, objective, recipe, report=partial(print, "tuning", flush=True))
    write_model(model, work / "target")
    summary = _summary(model, run, arguments.rows * arguments.row_tokens, recipe, started)
    record(work, "tuning", {**summary, "epoch_tokens": len(packed), "repeats": arguments.tuning_repeats})


def make_first_look(arguments: argparse.Namespace) -> None:
    """What the target was before tuning: the two numbers that tuning moves."""
    device, work = chosen_device(), arguments.work
    prefer_attention("flash")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    target = read_model(work / "target", device)
    parsed = evaluate.completion_report(target, tokenizer, evaluate.read_prompts(arguments.prompts))
    rows = [(row["package"], row["text"]) for row in corpus.read_texts(work / "held_out.jsonl")]
    held_out = evaluate.held_out_report(target, tokenizer, rows)
    content = {
        "parsed": parsed["parsed"],
        "tasks": parsed["tasks"],
        "fewer_than_two_lines": sum(row["reason"] == "fewer than two lines" for row in parsed["completions"]),
        "model_bits_per_byte": held_out["model_bits_per_byte"],
    }
    print(content, flush=True)
    record(work, "before_tuning", content)


def make_continuations(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    device, work = chosen_device(), arguments.work
    prefer_attention("flash")
    target = read_model(work / "target", device)
    packed = Packed((work / "train", work / "functions"), device)
    made = continue_corpus(target, packed, arguments.continuation_seconds, arguments.continued_rows)
    np.save(work / "continued.npy", made.cpu().numpy())
    content = {"rows": len(made), "row_tokens": made.shape[1], "seconds": time.perf_counter() - started}
    print(content, flush=True)
    record(work, "continuations", content)


def make_small(arguments: argparse.Namespace) -> None:
    """The small model twice, on equally many steps and tokens: distilled (`ssm`), and plain (`ssm_plain`)."""
    device, work = chosen_device(), arguments.work
    prefer_attention(arguments.attention)
    target = read_model(work / "target", device)
    packed = Packed((work / "train", work / "functions"), device)
    continued = torch.from_numpy(np.load(work / "continued.npy")).to(device)
    rows, row_tokens = arguments.rows, arguments.row_tokens
    steps = arguments.small_steps
    for name in ("ssm", "ssm_plain"):
        started = time.perf_counter()
        torch.manual_seed(0)
        model = Llama(arguments.small_sizes).to(device)
        if name == "ssm":
            half = max(1, rows // 2)
            own = endless_rows(continued, max(1, half * row_tokens // continued.shape[1]))
            objective = distillation_objective(model, target, packed.batches(half, row_tokens, 7), own, device)
        else:
            objective = plain_objective(model, packed.batches(rows, row_tokens, 7), device)
        recipe = Recipe(
            matrix_lr=arguments.matrix_lr,
            other_lr=arguments.other_lr,
            budget_s=arguments.small_seconds,
            steps=steps,
        )
        run = train(model, objective, recipe, report=partial(print, name, flush=True))
        write_model(model, work / name)
        record(work, name, _summary(model, run, rows * row_tokens, recipe, started))
        steps = run.steps


def make_evaluation(arguments: argparse.Namespace) -> None:
    """Everything that the card says of the models, measured on their bfloat16 weights computed in float32."""
    started = time.perf_counter()
    device, work = chosen_device(), arguments.work
    prefer_attention("flash")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    target = read_model(work / "target", device)
    tasks = evaluate.read_prompts(arguments.prompts)
    completions = evaluate.completion_report(target, tokenizer, tasks)
    record(work, "human_eval", completions)
    print("human_eval", completions["parsed"], "of", completions["tasks"], flush=True)
    rows = [(row["package"], row["text"]) for row in corpus.read_texts(work / "held_out.jsonl")]
    held_out = evaluate.held_out_report(target, tokenizer, rows)
    record(work, "held_out", held_out)
    print({name: value for name, value in held_out.items() if name != "packages"}, flush=True)
    small = {"distilled": work / "ssm", "plain": work / "ssm_plain"}
    if all((folder / "config.json").exists() for folder in small.values()):
        draw = torch.Generator(device=device).manual_seed(11)
        prefixes = Packed((work / "held_out",), device).prefixes(arguments.acceptance_rows, 128, draw)
        models = {name: read_model(folder, device) for name, folder in small.items()}
        accepted = evaluate.acceptance_report(target, models, prefixes)
        record(work, "acceptance", accepted)
        print(accepted, flush=True)
        for name, model in models.items():
            bits = sum(evaluate.bits_of_files(model, tokenizer, [text for _, text in rows]))
            record(work, f"held_out_{name}_ssm", {"model_bits_per_byte": bits / int(str(held_out["bytes"]))})
    record(work, "evaluation", {"seconds": time.perf_counter() - started, "machine": machine()})


def make_assets(arguments: argparse.Namespace) -> None:
    """Copies models and tokenizer to the assets, the lists and numbers beside this module."""
    for name, source in (("model", "target"), ("ssm", "ssm")):
        folder = arguments.assets / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        files = [
            *sorted((arguments.work / source).iterdir()),
            *sorted((arguments.work / "tokenizer").iterdir()),
        ]
        for file in files:
            shutil.copyfile(file, folder / file.name)
    for name in ("corpus.json", "results.json"):
        shutil.copyfile(arguments.work / name, HERE / name)


def make_card(arguments: argparse.Namespace) -> None:
    """Writes the model card from the committed list and numbers alone."""
    listing, results = (json.loads((HERE / name).read_text()) for name in ("corpus.json", "results.json"))
    arguments.assets.mkdir(parents=True, exist_ok=True)
    (arguments.assets / "MODEL_CARD.md").write_text(card.model_card(listing, results))
    (HERE / "README.md").write_text(card.with_second((HERE / "README.md").read_text(), results))


def make_shipped(arguments: argparse.Namespace) -> None:
    """Puts the models and the tokenizer that ship where the later stages look for them."""
    work = arguments.work
    for name, source in (("target", "model"), ("ssm", "ssm"), ("tokenizer", "model")):
        (work / name).mkdir(parents=True, exist_ok=True)
        for file in (arguments.assets / source).iterdir():
            if file.name.startswith("tokenizer") == (name == "tokenizer"):
                shutil.copyfile(file, work / name / file.name)
    record(work, "ssm", recorded(HERE)["ssm"])


def make_encode(arguments: argparse.Namespace) -> None:
    """Encodes the corpus with the tokenizer that is there, and says whether it is the corpus of the shipped models."""
    started = time.perf_counter()
    work = arguments.work
    counts = _encode(Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json")), work)
    here, there = (json.loads((folder / "corpus.json").read_text()) for folder in (work, HERE))
    same = here["packages"] == there["packages"] and here["files_kept"] == there["files_kept"]
    content = {"same_as_shipped": same, **counts, "seconds": time.perf_counter() - started}
    print(json.dumps(content), flush=True)
    record(work, "second_corpus", content)


def make_second(arguments: argparse.Namespace) -> None:
    """Further small models, each beside the first: every kind on equally many steps and tokens, at most as many as the
    first one had. A kind that is there already, as `results.json` says, is left as it is. With --gpus, kinds are
    trained side by side."""
    if arguments.gpus:
        _second_side_by_side(arguments)
        return
    device, work = chosen_device(), arguments.work
    prefer_attention(arguments.attention)
    target, first = (read_model(work / name, device) for name in ("target", "ssm"))
    packed = Packed((work / "train", work / "functions"), device)
    continued = torch.from_numpy(np.load(work / "continued.npy")).to(device)
    rows, row_tokens = arguments.rows, arguments.row_tokens
    for name in arguments.kinds:
        kind = boost.KINDS[name]
        tuned = arguments.second_start == "first" and not kind.wide
        label = f"{name}-tuned" if tuned else name
        done = recorded(work).get("second", {})
        if label in done:
            print(f"{label} is there, after {done[label]['steps']} steps", flush=True)
            continue
        started = time.perf_counter()
        seed = 1 + list(boost.KINDS).index(name)
        torch.compiler.reset()  # or the kinds before fill the compiler's limit of variants
        torch.manual_seed(seed)
        if tuned:
            model = read_model(work / "ssm", device).requires_grad_(True).train()
        else:
            model = Llama(arguments.wide_sizes if kind.wide else arguments.small_sizes).to(device)
        data, texts = packed, continued
        if kind.resampled:
            draw = torch.Generator(device=device).manual_seed(seed)
            data = packed.resampled(seed)
            texts = continued[torch.randint(len(continued), (len(continued),), generator=draw, device=device)]
        half = max(1, rows // 2)
        own = endless_rows(texts, max(1, half * row_tokens // continued.shape[1]), seed + 2)
        batches = data.batches(half, row_tokens, 1000 * seed)
        emphasis = boost.emphasis_of(kind, [first], device)
        rate = arguments.tuning_rate if tuned else 1.0
        recipe = Recipe(
            matrix_lr=arguments.matrix_lr * rate,
            other_lr=arguments.other_lr * rate,
            budget_s=arguments.second_seconds,
            steps=arguments.second_steps or next((one["steps"] for one in done.values()), None),
            most_steps=recorded(work)["ssm"]["steps"],
        )
        folder = work / "second" / label

        def checkpoint(_: int, model: Llama = model, folder: Path = folder) -> None:
            write_model(model, folder)

        objective = distillation_objective(model, target, batches, own, device, emphasis)
        run = train(model, objective, recipe, partial(print, label, flush=True), checkpoint)
        write_model(model, folder)
        content = {
            "kind": {**vars(kind), "start": "first" if tuned else "scratch"},
            **_summary(model, run, 2 * half * row_tokens, recipe, started),
            "continued_rows": len(continued),
        }
        record(work, "second", {**recorded(work).get("second", {}), label: content})


LANES = "lanes"
HANDED_ON = (
    "rows", "row_tokens", "matrix_lr", "other_lr", "attention", "tuning_rate", "second_steps", "second_start"
)  # fmt: skip


def _second_side_by_side(arguments: argparse.Namespace) -> None:
    """A process a GPU, each with some of the kinds, in a folder that shows the same inputs. RuntimeError if one fails,
    after what the others made is taken in."""
    work, gpus = arguments.work, arguments.gpus
    missing = [kind for kind in arguments.kinds if kind not in recorded(work).get("second", {})]
    lanes = {gpu: missing[place :: len(gpus)] for place, gpu in enumerate(gpus) if missing[place :: len(gpus)]}
    handed = [word for name in HANDED_ON for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    started = {}
    for gpu, kinds in lanes.items():
        folder = work / LANES / gpu
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for entry in work.iterdir():
            if entry.name not in (LANES, "second", "results.json"):
                (folder / entry.name).symlink_to(entry.resolve())
        record(folder, "ssm", recorded(work)["ssm"])
        words = ["second", "--work", str(folder), "--kinds", *kinds, *handed, *(["--toy"] if arguments.toy else [])]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            started[gpu] = subprocess.Popen(
                [sys.executable, "-m", "training.make", *words],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    failed = [gpu for gpu, process in started.items() if process.wait()]
    for gpu in started:
        folder = work / LANES / gpu
        for label, content in recorded(folder).get("second", {}).items():
            target = work / "second" / label
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(folder / "second" / label, target)
            record(work, "second", {**recorded(work).get("second", {}), label: content})
            print(f"{label}: {content['steps']} steps, {content['stage_seconds']:.0f} s on GPU {gpu}", flush=True)
    if failed:
        logs = ", ".join(str(work / LANES / gpu / "log.txt") for gpu in failed)
        raise RuntimeError(f"training failed on GPU {', '.join(failed)}: {logs}")


def make_pairs(arguments: argparse.Namespace) -> None:
    """What every further small model adds to the first, on HumanEval's prompts and on held-out text."""
    started = time.perf_counter()
    device, work = chosen_device(), arguments.work
    prefer_attention("flash")
    target = read_model(work / "target", device)
    models = {"SSM": read_model(work / "ssm", device)}
    models |= {label: read_model(work / "second" / label, device) for label in recorded(work).get("second", {})}
    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    tasks = evaluate.read_prompts(arguments.prompts)[: arguments.pair_rows]
    texts = {"HumanEval": [torch.tensor(tokenizer.encode(prompt).ids, device=device) for _, prompt in tasks]}
    draw = torch.Generator(device=device).manual_seed(11)
    prefixes = Packed((work / "held_out",), device).prefixes(arguments.pair_rows, arguments.pair_tokens, draw)
    texts["held-out text"] = list(prefixes)
    reports = []
    for name, openings in texts.items():
        for temperature in coverage.TEMPERATURES:
            rows = coverage.continued(target, openings, arguments.pair_tokens, temperature)
            reports.append({"texts": name, **coverage.report(models, rows, temperature)})
            arms = {arm: one["trees"]["16"]["accepted"] for arm, one in reports[-1]["arms"].items()}
            print(name, temperature, f"{time.perf_counter() - started:.0f} s", json.dumps(arms), flush=True)
    parameters = {name: parameter_count(model) for name, model in models.items()}
    content = {
        "costs": coverage.costs(parameters),
        "reports": reports,
        "judged": {arm: coverage.judged(arm, reports) for arm in reports[0]["arms"]},
        "seconds": time.perf_counter() - started,
        "machine": machine(),
    }
    record(work, "pairs", content)
    print(card.second_section({"second": recorded(work).get("second", {}), "pairs": content}))


def make_keep(arguments: argparse.Namespace) -> None:
    """Takes the numbers of the further small models over into the list beside this module, and the one that pays, if
    one does, into the assets."""
    results = recorded(arguments.work)
    for key in ("second_corpus", "second", "pairs"):
        record(HERE, key, results[key])
    label = card.paying(results)
    if label is None:
        print(f"none gains {coverage.GAIN:.2f}x: no second model ships", flush=True)
        return
    folder = arguments.assets / "second"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*(arguments.work / "second" / label).iterdir(), *(arguments.work / "tokenizer").iterdir()):
        shutil.copyfile(file, folder / file.name)
    print(f"{label} ships", flush=True)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "corpus": make_corpus,
    "tokenizer": make_tokenizer,
    "target": make_target,
    "first-look": make_first_look,
    "tuning": make_tuning,
    "continuations": make_continuations,
    "small": make_small,
    "evaluate": make_evaluation,
    "assets": make_assets,
    "card": make_card,
    "shipped": make_shipped,
    "encode": make_encode,
    "second": make_second,
    "pairs": make_pairs,
    "keep": make_keep,
}

LINES = {
    "all": (
        "corpus",
        "tokenizer",
        "target",
        "first-look",
        "tuning",
        "continuations",
        "small",
        "evaluate",
        "assets",
        "card",
    ),
    "boosting": ("shipped", "corpus", "encode", "continuations", "second", "pairs", "keep", "card"),
}
"""Names for several stages in their order."""

TOY = Sizes(64, 32, 2, 1, 2, 128)
TOY_WIDE = Sizes(96, 32, 3, 1, 2, 192)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.make", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, *LINES])
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="folder of everything not kept")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--prompts", type=Path, help="HumanEval as JSON lines: kept out of the corpus, then measured")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--packages", nargs="+", default=[], help="a small corpus of these alone (cpython: the library)"
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--tokenizer-bytes", type=int, default=100_000_000)
    parser.add_argument("--rows", type=int, default=64, help="rows of a batch")
    parser.add_argument("--row-tokens", type=int, default=TARGET.max_position_embeddings)
    parser.add_argument("--matrix-lr", type=float, default=0.03)
    parser.add_argument("--other-lr", type=float, default=0.006)
    parser.add_argument("--attention", choices=["flash", "cudnn"], default="flash", help="kernel for training")
    parser.add_argument("--target-seconds", type=float, default=840.0)
    parser.add_argument("--target-steps", type=int, help="instead of seconds")
    parser.add_argument("--tuning-seconds", type=float, default=150.0)
    parser.add_argument("--tuning-steps", type=int, help="instead of seconds")
    parser.add_argument("--tuning-rate", type=float, default=0.2, help="share of the target's rates")
    parser.add_argument("--tuning-repeats", type=int, default=6, help="times an epoch that long bodies are seen")
    parser.add_argument("--continuation-seconds", type=float, default=55.0)
    parser.add_argument("--continued-rows", type=int, default=4096, help="rows continued at once")
    parser.add_argument("--small-seconds", type=float, default=120.0)
    parser.add_argument("--small-steps", type=int, help="instead of seconds")
    parser.add_argument("--acceptance-rows", type=int, default=1024)
    parser.add_argument("--kinds", nargs="+", choices=boost.KINDS, default=list(boost.KINDS)[:5], help="of `second`")
    parser.add_argument("--second-seconds", type=float, default=130.0, help="of the first kind; all take its steps")
    parser.add_argument("--second-steps", type=int, help="instead of seconds")
    parser.add_argument(
        "--second-start",
        choices=["scratch", "first"],
        default="scratch",
        help="where a further small model starts: anew, or at the first one, at the rates of tuning",
    )
    parser.add_argument(
        "--gpus", nargs="+", default=[], metavar="index", help="train kinds of `second` side by side, on one GPU each"
    )
    parser.add_argument("--pair-rows", type=int, default=256, help="texts of each sort to measure pairs on, at most")
    parser.add_argument("--pair-tokens", type=int, default=128, help="tokens of each continuation there")
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the pipeline out")
    arguments = parser.parse_args(words)
    arguments.target_sizes = TOY if arguments.toy else TARGET
    arguments.small_sizes = TOY if arguments.toy else SSM
    arguments.wide_sizes = TOY_WIDE if arguments.toy else boost.WIDE
    arguments.stages = [stage for word in arguments.stages for stage in LINES.get(word, (word,))]
    needing = {"corpus", "first-look", "evaluate", "pairs"} & set(arguments.stages)
    if needing and arguments.prompts is None:
        parser.error(f"--prompts is needed for {', '.join(sorted(needing))}")
    if arguments.gpus and arguments.second_steps is None:
        parser.error("--gpus needs --second-steps: kinds that are trained side by side must take equally many")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    for stage in arguments.stages:
        print(f"== {stage}", flush=True)
        STAGES[stage](arguments)


if __name__ == "__main__":
    main()
