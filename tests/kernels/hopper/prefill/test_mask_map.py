"""The map of a dense mask, in the interpreter: which blocks are listed, their flags, and the bits of each key."""

import pytest
import torch
from flashcore_kernels.problem import Inputs, check_problem, distinct
from flashcore_kernels.runtime.launch import OPERANDS, launch

mask_map = pytest.importorskip("flashcore_kernels.hopper.prefill.mask_map")
FLAGS = {name: getattr(mask_map, name).value for name in ("READ", "HIDES", "GAPS", "FAR_BIAS", "FLAGS")}
BLOCK_M, BLOCK_N = 64, 32


def made(mask: torch.Tensor, block_m: int = BLOCK_M, block_n: int = BLOCK_N):
    """(shape, lines `[B', H', T', 2, NB + 1]`, bits `[B', H', Q', NB, BLOCK_N / 32]`) of a mask."""
    query = torch.empty(mask.shape[0], mask.shape[1], mask.shape[2], 16)
    key = torch.empty(mask.shape[0], mask.shape[1], mask.shape[3], 16)
    problem = check_problem(Inputs(query, key, key, mask=mask))
    shape = mask_map.map_shape(mask, mask.shape[3], block_m, block_n)
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    lines = torch.full((shape.line_words,), -7, dtype=torch.int32)
    bits = torch.full((shape.bit_words,), 0, dtype=torch.int32)
    made = mask_map.make_map_launch(problem, mask, shape)
    done = torch.zeros(made.counters, dtype=torch.int32)
    tensors = dict.fromkeys(OPERANDS) | {"mask": mask, "mask_lines": lines, "mask_bits": bits, "counters": done}
    arguments = made.arguments(tuple(tensors[name] for name in OPERANDS))
    launch(made.kernel, made.grid, arguments, made.scalars, made.constants)
    assert not done.any()
    assert lines[-1] == -7, "the word behind the last line is nobody's"
    lines = lines[:-1].view(*shape.lines, 2, shape.num_blocks + 1)
    return shape, lines, bits.view(*shape.rows, shape.num_blocks, block_n // 32)


def check(mask: torch.Tensor, **blocks) -> list[int]:
    """Hold the map of a mask against what the mask says; returns all flags that were set."""
    shape, lines, bits = made(mask, **blocks)
    mask = distinct(mask)
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    found = []
    for b, h, t in torch.cartesian_prod(*map(torch.arange, shape.lines)).view(-1, 3).tolist():
        rows = slice(t * shape.block_m, (t + 1) * shape.block_m)
        counts, blocks = lines[b, h, t].tolist()
        listed = 0
        for block in range(shape.num_blocks):
            assert counts[block] == listed
            cols = slice(block * shape.block_n, (block + 1) * shape.block_n)
            part, values = seen[b, h, rows, cols], mask[b, h, rows, cols]
            if not part.any():
                continue
            number, flags = divmod(blocks[listed], FLAGS["FLAGS"])
            assert number == block
            read = not part.all() if mask.dtype == torch.bool else bool((values != 0).any())
            assert bool(flags & FLAGS["READ"]) == read
            assert bool(flags & FLAGS["HIDES"]) == (not part.all())
            assert bool(flags & FLAGS["GAPS"]) == (not part.any(0).all())
            far = mask.dtype != torch.bool and bool((values[part] < -1e38).any())
            assert bool(flags & FLAGS["FAR_BIAS"]) == far
            found.append(flags)
            listed += 1
            if flags & FLAGS["HIDES"]:
                words = bits[b, h, rows, block]
                each = (words[..., None] >> torch.arange(32)) & 1
                assert torch.equal(each.flatten(1)[:, : part.shape[1]].bool(), part)
        assert counts[-1] == listed and blocks[listed] == shape.num_blocks * FLAGS["FLAGS"]
    return found


def checkered(*shape: int) -> torch.Tensor:
    """Blocks that show all, some and nothing, in every order; and gaps."""
    generator = torch.Generator().manual_seed(sum(shape))
    keep = torch.rand(shape, generator=generator) < 0.7
    tiles = [-(-shape[2] // BLOCK_M), -(-shape[3] // BLOCK_N)]
    kind = torch.randint(0, 4, (*shape[:2], *tiles), generator=generator)
    kind = kind.repeat_interleave(BLOCK_M, 2).repeat_interleave(BLOCK_N, 3)[:, :, : shape[2], : shape[3]]
    gaps = torch.arange(shape[3]) % 5 != 0
    return ((kind == 0) | ((kind == 1) & keep) | ((kind == 2) & gaps)).contiguous()


@pytest.mark.parametrize("shape", [(2, 3, 130, 200), (1, 2, 1, 97), (3, 1, 64, 64), (1, 1, 65, 33), (2, 1, 7, 31)])
def test_bool(shape):
    found = check(checkered(*shape))
    if shape[2] == 130:
        hides = FLAGS["READ"] | FLAGS["HIDES"]
        assert {0, hides, hides | FLAGS["GAPS"]} == set(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bias(dtype):
    mask = checkered(2, 2, 130, 200)
    bias = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    bias = torch.where(torch.arange(200) < 64, 0.0, bias)  # two columns of blocks of zeros
    bias = bias.masked_fill(~mask, -torch.inf)
    if dtype == torch.float32:
        bias[0, 0, 3, 5] = torch.finfo(dtype).min
    found = check(bias.to(dtype))
    assert {0, FLAGS["READ"]} <= set(found)
    assert any(flags & FLAGS["FAR_BIAS"] for flags in found) == (dtype == torch.float32)


@pytest.mark.parametrize("how", ["expanded", "transposed", "sliced", "columns"])
def test_strides(how):
    mask = checkered(2, 3, 130, 70)
    if how == "expanded":
        mask = mask[:1, :, :1].expand(2, -1, 130, -1)
        assert made(mask)[0].lines == (1, 3, 1)
    elif how == "transposed":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif how == "sliced":
        mask = torch.cat([mask, mask], dim=3)[..., 11:77]
    else:
        mask = mask.transpose(0, 1).contiguous().transpose(0, 1)
    check(mask)


def test_vectors():
    """Rows are read in vectors of 16 bytes where they lie so, to behind the last key, but never behind the memory."""
    wide = torch.zeros(1, 1, 5, 208, dtype=torch.uint8)
    assert mask_map.vector_unit(wide) == mask_map.vector_unit(wide[..., :197]) == 16
    assert mask_map.vector_unit(wide[..., 1:]) == mask_map.vector_unit(torch.zeros(1, 1, 5, 200).byte()) == 1
    assert mask_map.vector_unit(torch.zeros(1, 1, 5, 200)) == 4
    ends = torch.zeros(4 * 208 + 197, dtype=torch.uint8).as_strided((1, 1, 5, 197), (1, 1, 208, 1))
    assert mask_map.vector_unit(ends) == 1
    assert mask_map.vector_unit(torch.zeros(1, 1, 1, 16, dtype=torch.uint8).expand(2, 1, 5, 16)) == 16
    mask = torch.zeros(2, 2, 130, 208, dtype=torch.bool)
    mask[..., 197:] = True  # what lies behind the last key counts for nothing
    mask[..., :197] = checkered(2, 2, 130, 197)
    check(mask[..., :197])


def test_many_blocks():
    """More than one program looks at at a time when it makes the line."""
    mask = torch.rand(1, 1, 1, 150 * BLOCK_N, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., torch.arange(150).repeat_interleave(BLOCK_N) % 3 == 1] = False
    check(mask)


def test_the_words_of_a_prefill():
    """Tiles and blocks as the Hopper kernel has them: four words a row and block."""
    check(checkered(1, 2, 200, 300), block_m=128, block_n=128)


def test_negative_control():
    mask = checkered(1, 1, 130, 200)
    shape, lines, bits = made(mask)
    other = mask.clone()
    other[0, 0, 100, 150] ^= True
    assert not torch.equal(bits, made(other)[2]) or not torch.equal(lines, made(other)[1])
