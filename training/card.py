"""Writes the model card, and the part of the README on further small models, from the list of the corpus and the
measured numbers.

Knows how to say things in Markdown. Measures nothing: each number on the card is read from `corpus.json` or
`results.json`, or follows from them by arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from training.coverage import GAIN, JUDGED


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def _architecture(target: dict[str, Any], small: dict[str, Any]) -> str:
    named = (
        ("layers", "num_hidden_layers"),
        ("hidden size", "hidden_size"),
        ("query heads", "num_attention_heads"),
        ("key-value heads", "num_key_value_heads"),
        ("head size", "head_dim"),
        ("feed-forward size", "intermediate_size"),
        ("vocabulary", "vocab_size"),
        ("context, tokens", "max_position_embeddings"),
        ("rotary base", "rope_theta"),
        ("norm epsilon", "rms_norm_eps"),
    )
    rows = [(label, target["sizes"][key], small["sizes"][key]) for label, key in named]
    rows.append(("parameters", f"{target['parameters']:,}", f"{small['parameters']:,}"))
    return _table(("", "target (`model/`)", "SSM (`ssm/`)"), rows)


def _corpus(listing: dict[str, Any]) -> str:
    kept, size, dropped = listing["files_kept"], listing["bytes_kept"], listing["files_dropped"]
    held_out = [one for one in listing["packages"] if one["split"] == "held-out"]
    parts = [
        f"Python source of {len(listing['packages']) - 1} distributions, all under permissive licences by their own "
        f"metadata, and of CPython {listing['python']}'s standard library, as installed on the training machine. "
        f"{listing['files_read']:,} files were read.",
        _table(
            ("split", "documents", "bytes"),
            (
                ("training", f"{kept['train']:,}", _bytes(size["train"])),
                ("held out", f"{kept['held-out']:,}", _bytes(size["held-out"])),
                ("functions cut from training files", f"{kept['functions']:,}", _bytes(size["functions"])),
                ("of those, with long bodies", f"{kept['bodies']:,}", _bytes(size["bodies"])),
            ),
        ),
        "Held out, by whole package, and never trained on: "
        + ", ".join(f"{one['name']} {one['version']}" for one in held_out)
        + ". A training file that resembled a held-out file (estimated Jaccard similarity of five-token shingles "
        f"{listing['rules']['near_held_out_jaccard']} or more) would have been dropped.",
        "Files left out, by the first rule that applied:",
        _table(("rule", "files"), ((rule, f"{count:,}") for rule, count in dropped.items())),
        f"Near-duplicates are judged at an estimated Jaccard similarity of "
        f"{listing['rules']['near_duplicate_jaccard']} or more (MinHash, 128 permutations). A package gives at most "
        f"{_bytes(listing['rules']['package_cap_bytes'])}, its tests at most "
        f"{listing['rules']['test_share']:.0%} of what it gives. Folders of vendored code and of test data are not "
        "read. No file holds a line of 40 characters or more of the HumanEval prompts that are measured above.",
    ]
    return "\n\n".join(parts)


def _run(name: str, one: dict[str, Any]) -> tuple[object, ...]:
    return (
        name,
        f"{one['steps']:,}",
        f"{one['tokens_per_step']:,}",
        f"{one['tokens_seen'] / 1e9:.2f} billion",
        f"{one['training_seconds']:.0f} s",
        f"{one['final_loss_nats']:.3f}",
    )


def _held_out(held_out: dict[str, Any]) -> str:
    rows = [
        (name, one["files"], f"{one['bytes']:,}", f"{one['model_bits_per_byte']:.3f}",
         f"{one['xz_bits_per_byte']:.3f}", f"{one['model_bits_per_byte'] / one['xz_bits_per_byte']:.1%}")
        for name, one in held_out["packages"].items()
    ]  # fmt: skip
    model, total = held_out["model_bits_per_byte"], f"{held_out['bytes']:,}"
    for label, key in (
        ("all, xz on one stream per package", "xz_bits_per_byte_one_stream_per_package"),
        ("all, xz on one stream of everything", "xz_bits_per_byte_one_stream"),
    ):
        xz = held_out[key]
        files = sum(one["files"] for one in held_out["packages"].values())
        rows.append((label, files, total, f"{model:.3f}", f"{xz:.3f}", f"{model / xz:.1%}"))
    return _table(("held out", "files", "bytes", "target, bits/byte", "xz -9, bits/byte", "target / xz"), rows)


def paying(results: dict[str, Any]) -> str | None:
    """The further small model that gains enough beside the first one, combined in whichever way, to ship."""
    most: dict[str, float] = {}
    for arm, value in results.get("pairs", {}).get("judged", {}).items():
        names = arm.split(", ")[0].split(" + ")
        if len(names) == 2 and names[1] in results["second"]:
            most[names[1]] = max(value, most.get(names[1], 0.0))
    label = max(most, key=lambda one: most[one], default=None)
    return label if label is not None and most[label] >= GAIN else None


def _pair_table(report: dict[str, Any], costs: dict[str, Any], key: str) -> str:
    nodes = (4, *JUDGED)
    rows = []
    for arm, one in report[key].items():
        cost = costs[arm.split(", ")[0]]
        trees = [one["trees"][str(count)] for count in nodes]
        rows.append((
            arm,
            _bytes(cost["bytes"]),
            cost["passes"],
            *(f"{one['covered'][str(count)]:.3f}" if one["covered"] else "" for count in (1, 2, 4, 8)),
            *(f"{tree['accepted']:.2f}, {tree['beside_first'][0]:.3f}x" for tree in trees),
        ))  # fmt: skip
    head = ("drafters", "weights read a level", "passes", *(f"k = {count}" for count in (1, 2, 4, 8)))
    return _table((*head, *(f"{count} nodes" for count in nodes)), rows)


def second_section(results: dict[str, Any]) -> str:
    """What further small models are worth beside the first, in numbers; what to do if there are none yet."""
    if "pairs" not in results:
        return (
            "Not trained yet. `python -m training.make boosting --prompts HumanEval.jsonl` trains the models, measures "
            "them and writes this part."
        )
    pairs, second = results["pairs"], results["second"]
    parts = [
        "Share of the target's tokens among the best k proposals, and tokens that a static tree of so many nodes has "
        "accepted a pass (beside the SSM alone at equal nodes). Greedy, then at temperature 0.8 with the noise that "
        "chooses. Weights in bfloat16; a level is one more token of depth.",
        _table(
            ("further model", "starts at", "steps", "tokens a step", "time", "parameters"),
            (
                (label, one["kind"]["start"], f"{one['steps']:,}", f"{one['tokens_per_step']:,}",
                 f"{one['training_seconds']:.0f} s", f"{one['parameters']:,}")
                for label, one in second.items()
            ),
        ),
    ]  # fmt: skip
    for report in pairs["reports"]:
        warmth = f"temperature {report['temperature']}" if report["temperature"] else "greedy"
        parts += [
            f"**{report['texts']}, {warmth}** ({report['rows']} texts, {report['continued_tokens']} tokens each, "
            f"{report['looping_rows']} of them loop)",
            _pair_table(report, pairs["costs"], "arms"),
        ]
    least = sorted(pairs["judged"].items(), key=lambda item: -item[1])
    parts.append(
        f"The rule: a second model ships if the two gain {GAIN - 1:.0%} accepted tokens a verified node, the mean over "
        f"trees of {', '.join(map(str, JUDGED))} nodes, in the worst of these tables. By it: "
        + ", ".join(f"{arm} {value:.3f}x" for arm, value in least)
        + "."
    )
    label = paying(results)
    parts.append(
        "No second model ships: none gains that much." if label is None else f"`{label}` ships as `assets/second`."
    )
    return "\n\n".join(parts)


BEGIN, END = "<!-- written by `python -m training.make card` -->", "<!-- end of what is written -->"


def with_second(readme: str, results: dict[str, Any]) -> str:
    """The README with its part on further small models as the numbers have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{second_section(results)}\n{END}{after}"


def model_card(listing: dict[str, Any], results: dict[str, Any]) -> str:
    """The text of `MODEL_CARD.md`."""
    target, small, plain = results["target"], results["ssm"], results["ssm_plain"]
    parse, accepted, tokenizer = results["human_eval"], results["acceptance"], results["tokenizer"]
    made, tuning, before = results["continuations"], results["tuning"], results["before_tuning"]
    epochs = target["tokens_seen"] / target["epoch_tokens"]
    reasons: dict[str, int] = {}
    for row in parse["completions"]:
        if not row["ok"]:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    failed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    packages = [
        (one["name"], one["version"], one["licence"], one["split"], one["files"], f"{one['bytes']:,}")
        for one in listing["packages"]
    ]
    parts = [
        "# Model card: ridgeline's embedded model",
        'A small language model of Python source, and a smaller one that drafts for it (an SSM, the "small '
        'speculative model" of SpecInfer). They ship with ridgeline so that every example, test and benchmark has a '
        "real model to run without a download. The code that made them is in `training/`; "
        "`python -m training.make all --prompts HUMAN_EVAL.jsonl` remakes them.",
        "Licence of the weights and the tokenizer: Apache-2.0.",
        "## Architecture",
        "Llama (`LlamaForCausalLM`): RMS norm before each part, rotary positions without scaling, grouped queries, "
        "SwiGLU, no biases, output layer tied to the embedding. Stored in bfloat16.",
        _architecture(target, small),
        f"Tokenizer, shared by both: byte-level BPE of {tokenizer['vocabulary']:,} tokens, trained on "
        f"{_bytes(tokenizer['trained_on_bytes'])} of the training split; "
        f"{tokenizer['held_out']['bytes_per_token']:.2f} bytes a token on held-out text. Token 0, "
        "`<|endoftext|>`, opens every text (the tokenizer adds it), separates documents and ends generation. `ssm/` "
        "holds its own copy of the tokenizer's files.",
        "## Training",
        _table(
            ("run", "steps", "tokens a step", "tokens seen", "time", "last loss, nats"),
            (
                _run("target", target),
                _run("target, tuning", tuning),
                _run("SSM, distilled (shipped)", small),
                _run("SSM, plain (for comparison)", plain),
            ),
        ),
        f"Machine: {target['machine']}. The target saw the training split and the functions cut from it {epochs:.1f} "
        f"times ({target['epoch_tokens']:,} tokens an epoch, documents shuffled anew each time, packed into rows of "
        f"{target['sizes']['max_position_embeddings']:,}). Muon for the matrices of the layers (rate "
        f"{target['matrix_lr']}, momentum 0.95, weight decay {target['weight_decay']}), AdamW for embedding and norms "
        f"(rate {target['other_lr']}, betas 0.9 and 0.95); both rates ramp up over {target['warmup']:.0%} of the "
        f"steps, stay until {target['hold']:.0%} and fall in a straight line to zero. bfloat16 autocast, float32 "
        "master weights.",
        f"Tuning went on from the bfloat16 weights at {tuning['matrix_lr'] / target['matrix_lr']:.0%} of those rates, "
        f"with the functions of long bodies {tuning['repeats']} times an epoch beside the training split. Before it, "
        f"{before['parsed']} of the {before['tasks']} completions below counted ({before['fewer_than_two_lines']} "
        "others were too short: bodies of one line), and held-out text took "
        f"{before['model_bits_per_byte']:.3f} bits a byte: tuning buys longer completions for a little of the latter. "
        "That is the reason for the stage, so the HumanEval prompts (never trained on) are not an untouched test set "
        "for this one number.",
        f"The SSM was trained twice on equally many steps and tokens. Plain: cross entropy on the corpus. Distilled: "
        f"Kullback-Leibler divergence from the target's distribution at temperature 1, half of each batch corpus "
        f"text, half the target's own continuations of corpus text ({made['rows']:,} rows of "
        f"{made['row_tokens']} tokens after 32 to 256 tokens of prefix; a quarter greedy, a quarter at temperature "
        "1, the rest between 0.3 and 1.0). The loss of the distilled run is that divergence, so it does not compare "
        "with the others.",
        "## Held-out text",
        _held_out(results["held_out"]),
        "The model reads each file alone, in windows of 2,048 tokens that advance by half, and pays for the end of "
        "the file too; xz reads the files as one stream. Weights as shipped (bfloat16), computed in float32. The "
        f"distilled SSM needs {results['held_out_distilled_ssm']['model_bits_per_byte']:.3f} bits a byte, the plain "
        f"one {results['held_out_plain_ssm']['model_bits_per_byte']:.3f}.",
        "## Completions that parse",
        f"{parse['parsed']} of {parse['tasks']} ({parse['rate']:.1%}) greedy continuations of {parse['tokens']} "
        "tokens of HumanEval prompts (tasks 0 to 81) parse as Python, prompt included, once an unfinished last "
        "statement is cut. A syntax error before the end, or fewer than two complete generated lines that are not "
        f"blank, is a failure. Failures: {failed}. This measures form; whether the code is right was not measured, "
        "and with this size it rarely is.",
        "## Acceptance of the SSM",
        _table(
            ("on the target's own continuations of held-out text", "distilled", "plain"),
            (
                (label, f"{accepted['distilled'][key]:.3f}", f"{accepted['plain'][key]:.3f}")
                for label, key in (
                    ("mean of sum min(p, q), temperature 1", "overlap_at_temperature_1"),
                    ("same greedy token, greedy continuations", "greedy_agreement"),
                )
            ),
        ),
        f"{accepted['rows']:,} prefixes of {accepted['prefix_tokens']} tokens (half at starts of held-out files, half "
        f"anywhere), each continued by the target for {accepted['continued_tokens']} tokens; mean over all continued "
        "positions, target and SSM given the same tokens. The first row is the chance that one drafted token is "
        "accepted in speculative sampling at temperature 1, the second in greedy decoding.",
        *(("## Further small models", second_section(results)) if paying(results) is not None else ()),
        "## Limits",
        "A model of this size has the form of Python, not its sense: names go astray, long programs lose the thread, "
        "English is poor, other languages are absent. It has seen 2,048 tokens at once and no more. It may repeat "
        "short passages of the packages below, licence headers above all. It was not trained to follow instructions "
        "or to be safe. Use it to exercise an inference engine, not to write software.",
        "## Corpus",
        _corpus(listing),
        "### Packages",
        _table(("package", "version", "licence", "split", "files", "bytes"), packages),
    ]
    return "\n\n".join(parts) + "\n"
