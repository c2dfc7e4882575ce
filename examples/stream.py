"""Show a completion as it is made."""

from ridgeline import LLM, SamplingParams

PROMPT = "import json\n\n\ndef load(path):\n"

with LLM() as llm:
    print(PROMPT, end="")
    for part in llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=64, stop="\n\n\n")):
        print(part.text, end="", flush=True)
    print()
