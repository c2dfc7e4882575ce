"""Every field of SamplingParams does what it says, seen from outside and compared with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from plain import Plain, scores

from ridgeline import LLM, SamplingParams

PROMPT = "the quick brown fox jumps"
END = 1


def only(llm: LLM, prompt: Any, **params: Any) -> Any:
    """The one completion of a prompt."""
    return llm.generate(prompt, SamplingParams(**params), use_tqdm=False)[0].outputs[0]


def letters(llm: LLM, value: float = 12.0) -> dict[int, float]:
    """A bias that makes the tiny model write plain letters and spaces."""
    assert llm.tokenizer is not None
    spelled = ((token, llm.tokenizer.token_text(token)) for token in range(2, llm.tokenizer.vocab_size))
    return {token: value for token, text in spelled if text.isascii() and text.strip().isalpha()}


CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.4},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.3},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "logit_bias": {"logit_bias": {40: 6.0, 41: 6.5, 42: -100.0}},
    "seed": {"seed": 12},
    "all cuts": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "all penalties": {"presence_penalty": -1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "top_p": 0.9},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
}
BASE = {"temperature": 1.0, "seed": 11, "max_tokens": 24, "ignore_eos": True}


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_the_one_that_plain_torch_chooses(llm: LLM, plain: Plain, case: str) -> None:
    params = SamplingParams(**{**BASE, **CASES[case]})
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
    assert len(tokens) == 24
    logits = plain.logits([*prompt, *tokens])
    for place, token in enumerate(tokens):
        expected = scores(logits[len(prompt) + place - 1], params, prompt, tokens[:place], params.seed or 0)
        assert token == int(expected.argmax()) or expected.max() - expected[token] < 1e-4, place


@pytest.mark.parametrize("case", CASES)
def test_every_setting_changes_something(llm: LLM, case: str) -> None:
    few = {**BASE, "logit_bias": dict.fromkeys(range(50, 56), 8.0), "max_tokens": 48}  # six tokens, often repeated
    assert only(llm, PROMPT, **{**few, **CASES[case]}).token_ids != only(llm, PROMPT, **few).token_ids


def test_cuts_that_cut_nothing_change_nothing(llm: LLM) -> None:
    base = only(llm, PROMPT, **BASE).token_ids
    for neutral in ({"top_k": 0}, {"top_k": -1}, {"top_k": 10**6}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert only(llm, PROMPT, **BASE, **neutral).token_ids == base


def test_top_k_of_one_is_greedy(llm: LLM) -> None:
    greedy = only(llm, PROMPT, **{**BASE, "temperature": 0.0}).token_ids
    assert only(llm, PROMPT, **BASE, top_k=1).token_ids == greedy
    assert only(llm, PROMPT, **BASE, top_p=1e-9).token_ids == greedy
    assert only(llm, PROMPT, **BASE, min_p=1.0).token_ids == greedy


def test_rows_of_a_batch_keep_their_own_settings(llm: LLM) -> None:
    several = [SamplingParams(**{**BASE, **case}) for case in CASES.values()]
    together = llm.generate([PROMPT] * len(several), several, use_tqdm=False)
    for params, output in zip(several, together):
        assert output.outputs[0].token_ids == llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


def test_max_tokens_and_the_rest_of_the_context(llm: LLM) -> None:
    short = only(llm, PROMPT, max_tokens=3, ignore_eos=True, temperature=0)
    assert (len(short.token_ids), short.finish_reason, short.stop_reason) == (3, "length", None)
    output = llm.generate(PROMPT, SamplingParams(max_tokens=None, ignore_eos=True, temperature=0), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 256
    assert output.outputs[0].finish_reason == "length"


def test_the_end_token_ends_unless_ignored(llm: LLM) -> None:
    to_the_end = {"logit_bias": {END: 100.0}, "temperature": 0.0, "max_tokens": 5}
    ended = only(llm, PROMPT, **to_the_end)
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([END], "stop", None)
    ignored = only(llm, PROMPT, **to_the_end, ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ([END] * 5, "length")


def test_min_tokens_holds_the_end_back(llm: LLM) -> None:
    held = only(llm, PROMPT, logit_bias={END: 100.0}, temperature=0.0, max_tokens=9, min_tokens=4)
    assert END not in held.token_ids[:4]
    assert held.token_ids[4] == END
    assert held.finish_reason == "stop"


def test_min_tokens_holds_stop_ids_and_stop_strings_back(llm: LLM) -> None:
    stop_id = only(llm, PROMPT, temperature=0.0, max_tokens=1, ignore_eos=True).token_ids[0]
    held = only(llm, PROMPT, temperature=0.0, max_tokens=9, min_tokens=3, stop_token_ids=[stop_id], ignore_eos=True)
    assert stop_id not in held.token_ids[:3]
    base = only(llm, PROMPT, **BASE, logit_bias=letters(llm))
    first = base.text[0]
    stopped = only(llm, PROMPT, **BASE, logit_bias=letters(llm), stop=first, min_tokens=6)
    assert len(stopped.token_ids) > 6
    assert stopped.text[: len(base.text[0])] == first


def test_stop_token_ids_stop_and_say_which(llm: LLM) -> None:
    base = only(llm, PROMPT, **BASE)
    stop = base.token_ids[7]
    at = base.token_ids.index(stop)
    ended = only(llm, PROMPT, **BASE, stop_token_ids=[stop])
    assert ended.token_ids == base.token_ids[: at + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_stop_strings_across_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    base = only(llm, PROMPT, **BASE, logit_bias=letters(llm))
    pieces = [llm.tokenizer.token_text(token) for token in base.token_ids]
    stop = pieces[5][-1] + pieces[6] + pieces[7][:1]  # the end of one token to the beginning of another
    at = base.text.index(stop)
    for include in (False, True):
        ended = only(llm, PROMPT, **BASE, logit_bias=letters(llm), stop=[stop], include_stop_str_in_output=include)
        assert ended.text == base.text[: at + (len(stop) if include else 0)]
        assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
        assert ended.token_ids == base.token_ids[: len(ended.token_ids)]
        assert "".join(pieces[: len(ended.token_ids)]).startswith(base.text[: at + len(stop)])
        assert not "".join(pieces[: len(ended.token_ids) - 1]).startswith(base.text[: at + len(stop)])


def test_a_stop_string_in_the_very_step_that_ends_the_request(llm: LLM) -> None:
    base = only(llm, PROMPT, **BASE, logit_bias=letters(llm))
    assert llm.tokenizer is not None
    before = llm.tokenizer.decode(base.token_ids[:9])
    last = base.text[len(before) :][:1] if len(base.text) > len(before) else ""
    stop = base.text[len(before) - 1 : len(before)] + last
    length = len(base.token_ids[:10])
    both = only(llm, PROMPT, **{**BASE, "max_tokens": length}, logit_bias=letters(llm), stop=stop)
    assert (both.finish_reason, both.stop_reason) == ("stop", stop)
    assert both.text == base.text[: base.text.index(stop)]


def test_text_held_back_for_a_stop_string_comes_at_the_end(llm: LLM) -> None:
    base = only(llm, PROMPT, **BASE, logit_bias=letters(llm))
    held = only(llm, PROMPT, **BASE, logit_bias=letters(llm), stop=base.text[-3:] + "#")
    assert held.text == base.text
    assert held.finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_never_appear(llm: LLM, length: int) -> None:
    """Their token sequences, that is, with and without a space in front (vLLM's meaning)."""
    tokenizer, bias = llm.tokenizer, letters(llm)
    assert tokenizer is not None

    def places(ids: list[int], part: list[int]) -> list[int]:
        return [at for at in range(len(ids)) if ids[at : at + len(part)] == part]

    many = {**BASE, "max_tokens": 80}
    base = only(llm, PROMPT, **many, logit_bias=bias).token_ids
    sequences = [base[at : at + length] for at in range(len(base) - length)]
    word = next(ids for ids in sequences if tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids)
    clean = only(llm, PROMPT, **many, logit_bias=bias, bad_words=[tokenizer.decode(word)]).token_ids
    assert not places(clean, word)
    first = places(base, word)[0]
    assert clean[: first + length - 1] == base[: first + length - 1], "only the last token of a bad word is forbidden"


def test_logprobs_are_a_rescore(llm: LLM, plain: Plain) -> None:
    output = llm.generate(PROMPT, SamplingParams(**BASE, logprobs=4, logit_bias={9: 20.0}), use_tqdm=False)[0]
    one = output.outputs[0]
    logs = plain.logprobs([*output.prompt_token_ids, *one.token_ids])
    assert one.logprobs is not None
    assert len(one.logprobs) == len(one.token_ids)
    total = 0.0
    for place, (token, table) in enumerate(zip(one.token_ids, one.logprobs)):
        expected = logs[len(output.prompt_token_ids) + place - 1]
        best = expected.topk(4)
        assert set(table) == {*best.indices.tolist(), token}
        for known, entry in table.items():
            assert entry.logprob == pytest.approx(float(expected[known]), abs=1e-4)
            assert entry.rank == int((expected > expected[known]).sum()) + 1
            assert entry.decoded_token == llm.tokenizer.decode([known], skip_special_tokens=False)  # type: ignore[union-attr]
        total += table[token].logprob
    assert one.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_logprobs_of_nothing_but_the_chosen_and_none_at_all(llm: LLM) -> None:
    chosen = only(llm, PROMPT, **BASE, logprobs=0)
    assert [list(table) for table in chosen.logprobs] == [[token] for token in chosen.token_ids]
    none = only(llm, PROMPT, **BASE)
    assert none.logprobs is None
    assert none.cumulative_logprob is None


def test_rows_that_ask_for_different_logprobs(llm: LLM) -> None:
    asked = [None, 0, 3, 20]
    outputs = llm.generate([PROMPT] * 4, [SamplingParams(**BASE, logprobs=k) for k in asked], use_tqdm=False)
    for k, output in zip(asked, outputs):
        tables = output.outputs[0].logprobs
        if k is None:
            assert tables is None
        else:
            assert all(max(k, 1) <= len(table) <= k + 1 for table in tables)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("tokens", [5, 150])
def test_prompt_logprobs_are_a_full_forward(llm: LLM, plain: Plain, count: int, tokens: int) -> None:
    """150 tokens come in chunks of 64, and the second time the prefix cache holds them."""
    ids = [2 + (7 * place) % 250 for place in range(tokens)]
    for _ in range(2):
        params = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=count)
        output = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == tokens
        logs = plain.logprobs(ids)
        for place in range(1, tokens):
            table = output.prompt_logprobs[place]
            assert table is not None
            expected = logs[place - 1]
            assert set(table) == {*expected.topk(count).indices.tolist(), ids[place]}
            assert table[ids[place]].logprob == pytest.approx(float(expected[ids[place]]), abs=1e-4)
            assert table[ids[place]].rank == int((expected > expected[ids[place]]).sum()) + 1


def test_prompt_logprobs_of_one_token(llm: LLM) -> None:
    output = llm.generate([[7]], SamplingParams(max_tokens=1, prompt_logprobs=2), use_tqdm=False)[0]
    assert output.prompt_logprobs == [None]
    assert llm.generate([[7]], SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_logprobs is None


def test_prompt_logprobs_with_several_samples(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=1, n=3, seed=1)
    output = llm.generate([[7, 8, 9, 10]], params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    assert [table is None for table in output.prompt_logprobs] == [True, False, False, False]


def test_samples_differ_and_share_the_prompt(llm: LLM) -> None:
    ids = [2 + place % 200 for place in range(100)]
    parts = llm.stream(ids, SamplingParams(n=8, seed=3, max_tokens=12, ignore_eos=True))
    cache = llm.built.engine.scheduler.cache
    most = 0
    for part in parts:
        most = max(most, cache.num_blocks - cache.free_blocks)
        output = part.output
    samples = [tuple(one.token_ids) for one in output.outputs]
    assert len(set(samples)) == 8
    assert [one.index for one in output.outputs] == list(range(8))
    # 100 tokens are 7 blocks of 16: 6 full ones shared, the last partly filled one copied, and one to grow.
    assert most <= 7 + 8 * 2 + 1
    alone = llm.generate([ids], SamplingParams(seed=3, max_tokens=12, ignore_eos=True), use_tqdm=False)[0]
    assert tuple(alone.outputs[0].token_ids) == samples[0]


def test_more_samples_than_seats(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(max_num_seqs=3)
    output = llm.generate(PROMPT, SamplingParams(n=10, seed=1, max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 10
    assert all(one.finish_reason == "length" for one in output.outputs)


def test_more_samples_than_the_pool_holds(make_llm: Callable[..., LLM]) -> None:
    small = make_llm(max_model_len=128, kv_cache_memory_bytes=11 * 8192)
    params = SamplingParams(n=12, seed=1, max_tokens=60, ignore_eos=True)
    tight = small.generate([[*range(3, 53)]], params, use_tqdm=False)[0]
    roomy = make_llm(max_model_len=128).generate([[*range(3, 53)]], params, use_tqdm=False)[0]
    assert small.built.engine.scheduler.preemptions > 0
    assert [one.token_ids for one in tight.outputs] == [one.token_ids for one in roomy.outputs]


def test_no_text_without_detokenize(llm: LLM) -> None:
    silent = only(llm, PROMPT, **BASE, detokenize=False, logprobs=1)
    assert silent.text == ""
    assert silent.token_ids == only(llm, PROMPT, **BASE).token_ids
    assert all(entry.decoded_token is None for table in silent.logprobs for entry in table.values())


def test_special_tokens_are_shown_if_asked_for(llm: LLM) -> None:
    bias = {"logit_bias": {END: 100.0}, "temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
    assert only(llm, PROMPT, **bias).text == ""
    assert only(llm, PROMPT, **bias, skip_special_tokens=False).text == "<|end|><|end|>"


def test_ids_that_no_text_has(llm: LLM) -> None:
    """A padded vocabulary: the model may choose ids that the tokenizer does not know."""
    padded = only(llm, PROMPT, logit_bias={287: 100.0}, temperature=0.0, max_tokens=3, logprobs=1)
    assert padded.token_ids == [287] * 3
    assert padded.text == ""


def test_a_seed_means_the_same_everywhere_and_none_is_drawn_from_the_engine(make_llm: Callable[..., LLM]) -> None:
    first, second, other = make_llm(), make_llm(), make_llm(seed=6)
    unseeded = {**BASE, "seed": None}

    def run(llm: LLM, **params: Any) -> list[list[int]]:
        outputs = llm.generate([PROMPT] * 3, SamplingParams(**params), use_tqdm=False)
        return [one.outputs[0].token_ids for one in outputs]

    drawn = run(first, **unseeded)
    assert len({tuple(one) for one in drawn}) == 3, "requests without a seed must not be copies"
    assert run(second, **unseeded) == drawn
    assert run(other, **unseeded) != drawn
    assert run(first, **BASE) == run(other, **BASE)
    assert run(first, **{**BASE, "seed": -4}) == run(second, **{**BASE, "seed": -4})


def test_all_fields_are_looked_at_here() -> None:
    seen = {
        *(name for case in CASES.values() for name in case), "n", "stop", "stop_token_ids", "bad_words", "min_tokens",
        "max_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "detokenize", "skip_special_tokens",
        "include_stop_str_in_output",
    }  # fmt: skip
    assert {one.name for one in fields(SamplingParams)} == seen


def prompts_of_many_lengths(count: int) -> list[list[int]]:
    return [[2 + (place * (number + 3)) % 250 for place in range(3 + 5 * (number % 9))] for number in range(count)]


def test_the_same_tokens_alone_and_among_32(make_llm: Callable[..., LLM], kernels: str) -> None:
    llm = make_llm(kernels=kernels)
    prompts = prompts_of_many_lengths(32)
    params = [
        SamplingParams(seed=number, temperature=[1.0, 0.7, 0.0][number % 3], max_tokens=10, top_p=0.95, ignore_eos=True)
        for number in range(32)
    ]
    together = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    llm2 = make_llm(kernels=kernels, enable_prefix_caching=False, max_num_batched_tokens=17, block_size=32)
    for prompt, one, tokens in zip(prompts, params, together):
        assert llm2.generate([prompt], one, use_tqdm=False)[0].outputs[0].token_ids == tokens


def test_the_same_tokens_after_preemption(make_llm: Callable[..., LLM], kernels: str) -> None:
    bytes_per_block = 2 * 2 * 16 * 4 * 16 * 2
    small = make_llm(kernels=kernels, max_model_len=128, kv_cache_memory_bytes=11 * bytes_per_block)
    large = make_llm(kernels=kernels, max_model_len=128)
    assert small.built.config.num_blocks == 11
    params = [SamplingParams(seed=number, max_tokens=70, ignore_eos=True, logprobs=2) for number in range(6)]
    prompts = prompts_of_many_lengths(6)
    tight = small.generate(prompts, params, use_tqdm=False)
    roomy = large.generate(prompts, params, use_tqdm=False)
    assert small.built.engine.scheduler.preemptions > 0
    assert sum(one.metrics.num_preemptions for one in tight if one.metrics) == small.built.engine.scheduler.preemptions
    for one, other in zip(tight, roomy):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert len(one.outputs[0].logprobs or ()) == 70


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduling_policy": "static", "max_num_seqs": 4},
        {"scheduling_policy": "priority", "max_num_seqs": 4},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
        {"kv_cache": False},
        {"max_num_seqs": 64, "max_num_batched_tokens": 5},
        {"max_num_seqs": 1},
    ],
    ids=str,
)
def test_schedules_change_no_token(llm: LLM, make_llm: Callable[..., LLM], settings: dict[str, Any]) -> None:
    prompts = prompts_of_many_lengths(11)
    params = [SamplingParams(seed=number, max_tokens=4 + number % 5, ignore_eos=True) for number in range(11)]
    expected = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    other = make_llm(**settings).generate(prompts, params, use_tqdm=False, priority=[n % 3 for n in range(11)])
    assert [one.outputs[0].token_ids for one in other] == expected


def test_prefix_hits_change_nothing_and_are_counted(llm: LLM) -> None:
    ids = [3 + (place * place) % 200 for place in range(70)]
    params = SamplingParams(**BASE, logprobs=1)
    first, second = (llm.generate([ids], params, use_tqdm=False)[0] for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert second.num_cached_tokens == 64  # 4 full blocks of 16; at least one token is computed
    assert second.metrics is not None
    assert second.metrics.num_cached_tokens == 64


def test_a_greedy_continuation_is_the_rest(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = llm.generate(PROMPT, params, use_tqdm=False)[0]
    tokens = output.outputs[0].token_ids
    rest = llm.generate([[*output.prompt_token_ids, *tokens[:5]]], replace(params, max_tokens=7), use_tqdm=False)[0]
    assert rest.outputs[0].token_ids == tokens[5:]
    assert torch.equal(torch.tensor(rest.prompt_token_ids), torch.tensor([*output.prompt_token_ids, *tokens[:5]]))
