"""What the GPU tests measured, collected in a file of JSON lines while they run."""

import json
import os
from pathlib import Path


def record(model, case, **figures):
    """Keep the figures of one case, where `run_all` asked for it."""
    if path := os.environ.get("KANI_NB_GPU_RESULTS"):
        with Path(path).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"model": model, "case": case, **figures}) + "\n")
