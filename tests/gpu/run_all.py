"""Run every GPU test and write what they measured: `python -m tests.gpu.run_all [FILE.json]`.

The file holds the environment, each test's outcome, and the figures. Its default is `tests/gpu/results/CARD.json`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path


def main():
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was run")
        return 2
    card = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        lines, report = Path(folder) / "figures.jsonl", Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junit-xml={report}"]
        code = subprocess.run(command, env=os.environ | {"KANI_NB_GPU_RESULTS": str(lines)}, check=False).returncode
        figures = [json.loads(each) for each in lines.read_text().splitlines()] if lines.exists() else []
        tests = {}
        for case in ET.parse(report).iter("testcase"):
            problem = next((each.tag for each in case if each.tag in ("failure", "error", "skipped")), "passed")
            tests[f"{case.get('classname')}::{case.get('name')}"] = problem
    result = {
        "card": card,
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": torch.cuda.mem_get_info()[1],
        "versions": {each: version(each) for each in ("torch", "transformers", "accelerate", "bitsandbytes")},
        "cuda": torch.version.cuda,
        "tests": tests,
        "figures": figures,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(each == 'passed' for each in tests.values())} of {len(tests)} passed; written to {target}")
    return code


if __name__ == "__main__":
    sys.exit(main())
