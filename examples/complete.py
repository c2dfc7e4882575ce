"""Complete a few prompts at once, and look at what it took."""

from ridgeline import LLM, SamplingParams

with LLM() as llm:
    for output in llm.generate(
        ["def fibonacci(n):\n", "class Stack:\n"],
        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=7),
        use_tqdm=False,
    ):
        print(output.prompt + output.outputs[0].text)
        print(f"# first token after {output.metrics.ttft_s:.3f} s, {1e3 * output.metrics.tpot_s:.2f} ms a token\n")
