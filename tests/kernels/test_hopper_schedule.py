"""The order of tiles on Hopper, its device functions run as plain Python: every tile once, and the work balanced."""

import types

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels import key_range  # noqa: E402
from flashcore_kernels.hopper import schedule, visible  # noqa: E402


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    language = types.SimpleNamespace(where=lambda condition, a, b: a if condition else b, minimum=min)
    monkeypatch.setattr(schedule, "gl", language)


def order(program, num_programs, tiles_per_head, num_heads, section):
    turns = schedule.tiles_of_program.fn(program, num_programs, tiles_per_head * num_heads)
    return [
        schedule.tile_at.fn(turn, program, num_programs, tiles_per_head, num_heads, section) for turn in range(turns)
    ]


@pytest.mark.parametrize("num_programs", [1, 3, 132])
@pytest.mark.parametrize(
    "tiles_per_head, num_heads, section", [(1, 1, 1), (4, 7, 3), (32, 32, 8), (8, 33, 33), (5, 40, 1)]
)
def test_every_tile_once(num_programs, tiles_per_head, num_heads, section):
    num_programs = min(num_programs, tiles_per_head * num_heads)
    done = [tile for p in range(num_programs) for tile in order(p, num_programs, tiles_per_head, num_heads, section)]
    assert sorted(done) == [(head, tile) for head in range(num_heads) for tile in range(tiles_per_head)]


@pytest.mark.parametrize("heads, kv_heads, bytes_per_key", [(32, 8, 512), (32, 32, 256), (8, 8, 1024), (16, 16, 640)])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_work_is_balanced(length, heads, kv_heads, bytes_per_key):
    """The longest of 132 programs against the mean, in blocks, for 16K tokens of the shapes that are published."""
    tiles, group = length // 128, heads // kv_heads
    heads = heads * 16384 // length
    section = schedule.heads_in_section(length, bytes_per_key, heads, group, tiles, 132)
    work = [sum(tile + 1 for _, tile in order(p, 132, tiles, heads, section)) for p in range(132)]
    mean = sum(work) / 132
    assert max(work) <= 1.035 * mean
    forward = [schedule.tile_at.fn(0, t, heads * tiles, tiles, heads, section)[1] + 1 for t in range(heads * tiles)]
    assert sum(forward) == sum(work)
    one_head_after_the_other = [t % tiles + 1 for t in range(heads * tiles)]
    assert max(sum(one_head_after_the_other[p::132]) for p in range(132)) > 1.05 * mean, "negative control"


def test_sections():
    """As many heads as half of the L2 holds, whole groups, equal sections, and never so few that nothing balances."""
    assert schedule.heads_in_section(2048, 512, 256, 4, 16, 132) == 88
    assert schedule.heads_in_section(16384, 1024, 8, 1, 128, 132) == 4
    assert schedule.heads_in_section(10**6, 512, 32, 4, 8000, 132) == 4
    assert schedule.heads_in_section(16, 512, 32, 4, 1, 132) == 32


def test_words_of_a_key_range():
    """The kernel's copy of the layout against its owner's."""
    for name in ("FIRST", "END", "QUERY_START", "LEFT", "RIGHT", "HOLES"):
        assert getattr(visible, name).value == getattr(key_range, name), name
    assert visible.BITMAP.value == key_range.HEADER_WORDS
    assert visible.FAR.value == key_range.FARTHEST
