"""Records of the Gluon kernels are made by keyword.

Triton hashes the functions that make and read a record, not its class. Made by position, a record whose fields change
places would leave the hash as it is, and Triton would run what it had compiled before.
"""

import ast
import inspect
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper import dropout, packed, records, visible  # noqa: E402
from flashcore_kernels.hopper.backward import records as of_backward  # noqa: E402
from flashcore_kernels.hopper.decode import records as of_decode  # noqa: E402
from flashcore_kernels.hopper.paged import records as of_paged  # noqa: E402
from flashcore_kernels.hopper.prefill import records as of_prefill  # noqa: E402

RECORDS = [
    record
    for module in (records, visible, packed, dropout, of_backward, of_decode, of_paged, of_prefill)
    for _, record in inspect.getmembers(module, inspect.isclass)
    if hasattr(record, "_fields")
]
NAMES = {record.__name__ for record in RECORDS}


def made_by_position(source: str) -> list[str]:
    """Calls of records in `source` that leave the place of a value to the order of the fields."""
    wrong = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in NAMES:
            fields = {keyword.arg for keyword in call.keywords}
            named = any(record.__name__ == call.func.id and fields == set(record._fields) for record in RECORDS)
            if call.args or not named:
                wrong.append(ast.unparse(call))
    return wrong


@pytest.mark.parametrize("file", sorted(Path(visible.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_by_keyword(file):
    assert made_by_position(file.read_text()) == []


def test_by_position_would_show():
    assert {"Visibility", "Tile", "Block", "KeyTile", "PackedTile", "Table", "RowDropout"} < NAMES
    assert made_by_position("Block(n=1, end=2)") == []
    for call in ("Block(1, 2)", "Block(n=1)", "Block(1, end=2)"):
        assert made_by_position(call) == [call]
