"""What ridgeline's speed and memory claims rest on: scripts that anyone can run.

`python -m benchmarks.run` runs the CPU suite; each script also runs alone (`--help`). A result goes to
`results/<machine>/<date>-<name>.json` with the machine, versions, commit, command and every raw timing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if importlib.util.find_spec("ridgeline") is None:  # a bare machine with a copy of the tree
    sys.path.insert(0, str(ROOT / "src"))
