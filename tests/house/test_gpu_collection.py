"""What `make gpu-test` collects on a machine that has no server's packages, and that it imports no server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
blocked = "fastapi starlette pydantic uvicorn prometheus_client jsonschema schemathesis opentelemetry llguidance"
for name in blocked.split():
    sys.modules[name] = None  # importing it raises ImportError
import pytest
where = ("tests/server", "tests/dashboard", "tests/cli", "tests/study/test_tune.py")
code = pytest.main([*where, "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"])
print("server:", [name for name in sys.modules if name.startswith("ridgeline.server")])
raise SystemExit(code)
"""


def test_the_gpu_tests_are_collected_without_the_servers_packages() -> None:
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "test_the_search_on_a_gpu" in found.stdout
    assert "server: []" in found.stdout
