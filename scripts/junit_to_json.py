"""Turn pytest's JUnit XML into a small JSON: where the tests ran, how many passed, which failed.

usage: python scripts/junit_to_json.py IN.xml OUT.json
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
import triton


def main(source: str, target: str) -> None:
    suite = ElementTree.parse(source).getroot().find("testsuite")
    cases = suite.findall("testcase")
    by_file: dict[str, int] = {}
    for case in cases:
        by_file[case.get("classname", "")] = by_file.get(case.get("classname", ""), 0) + 1
    record = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": float(suite.get("time", 0)),
        "tests": len(cases),
        "by_file": by_file,
        "failed": [
            f"{case.get('classname')}::{case.get('name')}"
            for case in cases
            if case.find("failure") is not None or case.find("error") is not None
        ],
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    Path(target).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
