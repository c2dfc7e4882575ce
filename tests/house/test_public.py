"""What the package shows: its public names, an import that costs nothing, a CLI without the server's needs."""

from __future__ import annotations

import subprocess
import sys

import ridgeline


def test_public_names() -> None:
    assert ridgeline.__all__ == ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams"]
    for name in ridgeline.__all__:
        assert getattr(ridgeline, name) is not None


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_ridgeline_loads_nothing_heavy() -> None:
    assert not loaded_by("import ridgeline") & {"torch", "numba", "transformers", "numpy"}


def test_the_command_line_starts_without_torch() -> None:
    assert not loaded_by("import ridgeline.cli.main") & {"torch", "numba", "transformers", "fastapi", "uvicorn"}


def test_the_engine_needs_neither_transformers_nor_a_server() -> None:
    assert not loaded_by("import ridgeline.llm") & {"transformers", "fastapi", "uvicorn", "pydantic", "triton"}


def test_running_the_engine_loads_no_compiler() -> None:
    """torch's brings sympy; a model without a chat template needs no jinja2."""
    run = "from ridgeline import LLM\nwith LLM(device='cpu') as llm: llm.generate(['x = 1'], use_tqdm=False)"
    assert not loaded_by(run) & {"sympy", "triton", "jinja2", "transformers"}
