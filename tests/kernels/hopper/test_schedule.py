"""The order of tiles on Hopper, its device functions run as plain Python: every tile once, and work balanced."""

import heapq

import pytest

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels import key_range  # noqa: E402
from flashcore_kernels.hopper import records, schedule, visible  # noqa: E402


class Programs:
    """What `schedule` needs of Gluon, for programs that run in turn."""

    where = staticmethod(lambda condition, a, b: a if condition else b)
    minimum = staticmethod(min)

    @staticmethod
    def atomic_add(counter, amount, sem, scope):
        counter[0] += amount
        return counter[0] - amount

    @staticmethod
    def store(counter, number):
        counter[0] = number


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    monkeypatch.setattr(schedule, "gl", Programs)


def tiles_in_order(tiles_per_head, num_heads, section):
    return [schedule.tile_at.fn(n, tiles_per_head, num_heads, section) for n in range(tiles_per_head * num_heads)]


def work_of(costs, speeds, counter):
    """When each program is done, and the numbers of all tiles that were computed.

    A program asks for its next tile when it fetches the fourth block from the end of one, or the first, two blocks
    before it computes that.
    """
    ends, done, draws = [0.0] * len(speeds), [], []

    def compute(program, number, now):
        begin = ends[program]
        ends[program] += costs[number] / speeds[program]
        done.append(number)
        heapq.heappush(draws, (max(now, begin - 2 / speeds[program], ends[program] - 6 / speeds[program]), program))

    for program in range(len(speeds)):
        compute(program, program, 0.0)
    while draws:
        now, program = heapq.heappop(draws)
        number = schedule.draw.fn(counter, len(costs), len(speeds))
        if number < len(costs):
            compute(program, number, now)
    return ends, done


@pytest.mark.parametrize("num_programs", [1, 3, 132])
@pytest.mark.parametrize(
    "tiles_per_head, num_heads, section", [(1, 1, 1), (4, 7, 3), (32, 32, 8), (8, 33, 33), (5, 40, 1)]
)
def test_every_tile_once(num_programs, tiles_per_head, num_heads, section):
    tiles = tiles_in_order(tiles_per_head, num_heads, section)
    assert sorted(tiles) == [(head, tile) for head in range(num_heads) for tile in range(tiles_per_head)]
    speeds = [1.0 + p % 7 for p in range(min(num_programs, len(tiles)))]
    counter = [0]
    for _ in range(2):
        _, done = work_of([1 + tile for _, tile in tiles], speeds, counter)
        assert sorted(done) == list(range(len(tiles)))
        assert counter == [0], "as the next launch wants it"
    _, done = work_of([1] * len(tiles), speeds, [1])
    assert len(done) < len(tiles) or len(tiles) == len(speeds), "negative control: a counter that was not at zero"


def test_positions(monkeypatch):
    """What consumers are told: sequence, head, tile; of numbers that are no tile's, one, and that it is none."""
    monkeypatch.setattr(schedule, "tile_at", schedule.tile_at.fn)
    order = records.TileOrder(all_heads=6, tiles_per_head=2, section=6)
    positions = [schedule.position_of.fn(number, 3, order) for number in range(14)]
    assert positions[:12] == [(b, h, tile) for tile in (1, 0) for b in (0, 1) for h in (0, 1, 2)]
    assert positions[12:] == [(1, 2, -1)] * 2


@pytest.mark.parametrize("heads, kv_heads, bytes_per_key", [(32, 8, 512), (32, 32, 256), (8, 8, 1024), (16, 16, 640)])
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 8192, 16384])
def test_causal_work_is_balanced(length, heads, kv_heads, bytes_per_key):
    """The last of 132 programs against the mean, for 16K tokens of the shapes that are published.

    A tile takes its blocks and half a block more, on SMs that are equally fast and on some that differ by up to 10 %.
    """
    tiles, group = length // 128, heads // kv_heads
    heads = heads * 16384 // length
    section = schedule.heads_in_section(length, bytes_per_key, heads, group, tiles, 132, 2)
    blocks = 2 if bytes_per_key == 1024 else 1  # of a tile's own keys
    costs = [(tile + 1) * blocks + 0.5 for _, tile in tiles_in_order(tiles, heads, section)]
    speeds = [1.0 - 0.1 * (p * 37 % 132) / 132 for p in range(132)]
    for speed in ([1.0] * 132, speeds):
        ends, _ = work_of(costs, speed, [0])
        assert max(ends) <= 1.045 * sum(costs) / sum(speed)
    shares = [sum(costs[p::132]) / speed for p, speed in enumerate(speeds)]
    assert max(shares) > 1.045 * sum(costs) / sum(speeds), "negative control: every 132nd tile"


def test_sections():
    """As many heads as a third of the L2 holds, whole groups, equal sections, and enough to keep all programs busy."""
    assert schedule.heads_in_section(2048, 512, 256, 4, 16, 132, 2) == 64
    assert schedule.heads_in_section(16384, 512, 32, 4, 128, 132, 2) == 8
    assert schedule.heads_in_section(16384, 256, 32, 1, 86, 132, 2) == 4
    assert schedule.heads_in_section(16384, 256, 32, 1, 86, 132, 5) == 8
    assert schedule.heads_in_section(10**6, 512, 32, 4, 8000, 132, 2) == 4
    assert schedule.heads_in_section(16, 512, 32, 4, 1, 132, 2) == 32
    assert schedule.heads_in_section(512, 1024, 256, 1, 4, 132, 2) == 64


def test_last_section_lacks_few_heads():
    """What the last section lacks of the others' size: never more than of the size that fits best, mostly less."""

    def lacks(groups, size):
        return -groups % size / size

    better = 0
    for groups in range(1, 200):
        for wanted in (1, 3, 4, 7, 16, 33):
            size = schedule.heads_in_section(1, schedule.SECTION_BYTES // wanted, 2 * groups, 2, 10**6, 132, 2) // 2
            assert min(groups, 2 / 3 * wanted) <= size <= 3 / 2 * wanted, (groups, wanted, size)
            assert lacks(groups, size) <= lacks(groups, min(wanted, groups)), (groups, wanted, size)
            better += lacks(groups, size) < lacks(groups, min(wanted, groups))
    assert better > 400
    assert schedule.heads_in_section(16384, 256, 32, 1, 10**6, 132, 2) == 4 and lacks(32, 6) == 2 / 3


def test_nobody_draws_where_each_program_has_one_tile():
    counter = [0]
    assert [schedule.draw.fn(counter, 132, programs) for programs in (132, 131)] == [132, 131]
    assert counter == [1]


def test_words_of_a_key_range():
    """The kernel's copy of the layout against its owner's."""
    for name in ("FIRST", "END", "QUERY_START", "LEFT", "RIGHT", "HOLES"):
        assert getattr(visible, name).value == getattr(key_range, name), name
    assert visible.BITMAP.value == key_range.HEADER_WORDS
    assert visible.FAR.value == key_range.FARTHEST
