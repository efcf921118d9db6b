"""Every path that only runs on a GPU: pass, fail or not run, and why. `make gpu-check` starts it.

Writes benchmarks/results/gpu_check.json, which README shows; the last line is its figures as JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

REPOSITORY = Path(__file__).parents[2]
RESULT = REPOSITORY / "benchmarks" / "results" / "gpu_check.json"


def run_tests() -> list[dict[str, str]]:
    """Name, outcome and reason of each test that is marked `gpu`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        code = subprocess.run([*command, "tests"], cwd=REPOSITORY, check=False).returncode
        if not report.exists():
            ending = f"pytest ended with code {code}, as after a crash, and wrote no report"
            return [{"name": "test_all", "outcome": "fail", "reason": ending}]
        return [read_case(case) for case in ElementTree.parse(report).getroot().iter("testcase")]


def read_case(case: ElementTree.Element) -> dict[str, str]:
    for tag, outcome in {"skipped": "not run", "failure": "fail", "error": "fail"}.items():
        if (found := case.find(tag)) is not None:
            reason = found.get("message", "").partition("\n")[0]
            return {"name": case.get("name", ""), "outcome": outcome, "reason": reason}
    return {"name": case.get("name", ""), "outcome": "pass", "reason": ""}


def main() -> None:
    cases = run_tests()
    for case in cases:
        name = case["name"].removeprefix("test_").replace("_", " ")
        print(f"{case['outcome']:8} {name}" + (f": {case['reason']}" if case["reason"] else ""))
    outcomes = [case["outcome"] for case in cases]
    figures = {outcome: outcomes.count(outcome) for outcome in ("pass", "fail", "not run")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    whole = {"device": device, "torch": torch.__version__, **figures, "cases": cases}
    if device != "none" or json.loads(RESULT.read_text())["device"] == "none":
        RESULT.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps({"device": device, **figures}))
    sys.exit(1 if figures["fail"] or not cases else 0)


if __name__ == "__main__":
    main()
