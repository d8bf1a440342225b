"""Turn pytest's JUnit XML into a small JSON: where the tests ran, how many passed, which failed.

usage: python scripts/junit_to_json.py IN.xml OUT.json
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarking import header


def main(source: str, target: str) -> None:
    suite = ElementTree.parse(source).getroot().find("testsuite")
    # A run that was cut off has a case without a name.
    cases = [case for case in suite.findall("testcase") if case.get("classname")]
    by_file: dict[str, int] = {}
    for case in cases:
        by_file[case.get("classname", "")] = by_file.get(case.get("classname", ""), 0) + 1
    record = {
        **header(),
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
