"""write_kv: new tokens land in their slots and nowhere else, from an int or from device memory, in e4m3 too."""

import pytest
import torch
from flashcore_kernels import write_kv
from flashcore_kernels.cache.kv_write import _write_inside
from flashcore_kernels.portable.kv_write_kernel import run_write

E4M3 = torch.float8_e4m3fn


def tokens(count: int, device, dtype=torch.float32, layout: str = "heads first"):
    generator = torch.Generator(device).manual_seed(count)
    shapes = (2, 3, count, 24), (2, 3, count, 16)
    if layout == "tokens first":  # as a projection leaves them
        return tuple(
            torch.randn(b, n, h, d, generator=generator, device=device).to(dtype).transpose(1, 2)
            for b, h, n, d in shapes
        )
    return tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)


def buffers(device, dtype):
    return tuple(torch.full((2, 3, 50, d), 7.0, device=device).to(dtype) for d in (24, 16))


def skip_where_the_interpreter_rounds(write: str, dtype: torch.dtype, device) -> None:
    if write == "kernel" and dtype == E4M3 and device.type == "cpu":
        pytest.skip("Triton's interpreter loses the carry in e4m3, and NaN")


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("where", ["int", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, E4M3], ids=str)
@pytest.mark.parametrize("write", ["kernel", "public"])
def test_tokens_land_in_their_slots(write, dtype, where, count, layout, device):
    skip_where_the_interpreter_rounds(write, dtype, device)
    new = tokens(count, device, torch.float16 if dtype == torch.float16 else torch.float32, layout)
    scales = (None, None)
    if dtype == E4M3:
        scales = tuple(torch.tensor([[0.25, 1.0, 4.0], [2.0, 0.5, 8.0]], device=device) for _ in range(2))
    held = buffers(device, dtype)
    slot = 9 if where == "int" else torch.tensor([9], device=device)
    if write == "public":
        write_kv(*held, *new, slot, *scales)
    else:
        run_write(*held, *new, *((None, 9) if where == "int" else (slot, 0)), *scales)
    for buffer, states, scale in zip(held, new, scales):
        want = states if scale is None else (states / scale[:, :, None, None]).to(E4M3)
        assert torch.equal(buffer[:, :, 9 : 9 + count].float(), want.float())
        assert (buffer[:, :, :9].float() == 7).all() and (buffer[:, :, 9 + count :].float() == 7).all()


@pytest.mark.parametrize("write", ["kernel", "public"])
def test_e4m3_is_divided_by_any_scale(write, device):
    """Quotients halfway between two e4m3 numbers, exactly: a product with the reciprocal falls to the wrong side."""
    halfway = torch.arange(1, 15, 2, device=device) / 16 + 1  # the last one below 2 would carry; see above
    # With the first row's reciprocals the products are above, with the second row's below.
    scales = torch.tensor([[4032.0, 16320.0, 8160.0], [15628.0, 16247.0, 8084.0]], device=device) / 4096
    states = (halfway * scales[:, :, None, None]).expand(2, 3, 1, 7).contiguous()
    want = (states / scales[:, :, None, None]).to(E4M3).float()
    assert torch.equal(want, halfway.to(E4M3).float().expand_as(want))
    by_reciprocal = (states * scales.reciprocal()[:, :, None, None]).to(E4M3).float()
    assert (by_reciprocal != want).sum() >= 12
    held = tuple(torch.zeros(2, 3, 4, 7, device=device).to(E4M3) for _ in range(2))
    if write == "public":
        write_kv(*held, states, states, 2, scales, scales)
    else:
        run_write(*held, states, states, None, 2, scales, scales)
    if write == "kernel" and device.type == "cpu":
        want = (halfway + 1 / 16).expand_as(want)  # where Triton's interpreter rounds each half up, and PyTorch to even
    for buffer in held:
        assert torch.equal(buffer[:, :, 2:3].float(), want)


@pytest.mark.parametrize("write", ["kernel", "public"])
def test_e4m3_saturates_and_keeps_nan(write, device):
    skip_where_the_interpreter_rounds(write, E4M3, device)
    new = tuple(
        torch.tensor([1e6, -1e6, torch.nan, 448.0], device=device).expand(2, 3, 1, 4).contiguous() for _ in range(2)
    )
    held = tuple(torch.zeros(2, 3, 4, 4, device=device).to(E4M3) for _ in range(2))
    ones = torch.ones(2, 3, device=device)
    if write == "public":
        write_kv(*held, *new, 0, ones, ones)
    else:
        run_write(*held, *new, None, 0, ones, ones)
    for buffer in held:
        row = buffer[0, 0, 0].float()
        assert row[0] == 448 and row[1] == -448 and row[2].isnan() and row[3] == 448


@pytest.mark.parametrize("write", ["kernel", "torch"])
def test_nothing_is_written_outside(write, device):
    """A slot that a graph has advanced too far."""
    for first, inside in ((48, 2), (50, 0), (60, 0)):
        held, new, slot = buffers(device, torch.float32), tokens(5, device), torch.tensor([first], device=device)
        if write == "kernel":
            run_write(*held, *new, slot, 0, None, None)
        else:
            _write_inside(held[0], new[0], slot)
            _write_inside(held[1], new[1], slot)
        for buffer, states in zip(held, new):
            assert torch.equal(buffer[:, :, 50 - inside :], states[:, :, :inside])
            assert (buffer[:, :, : 50 - inside] == 7).all()


def test_bad_input():
    held, new = buffers("cpu", torch.float32), tokens(5, "cpu")
    with pytest.raises(ValueError, match=r"slots \[46, 51\)"):
        write_kv(*held, *new, 46)
    with pytest.raises(ValueError, match="key: got torch.float16"):
        write_kv(*held, *(part.half() for part in new), 0)
    with pytest.raises(ValueError, match="with a scale of torch.float32"):
        write_kv(*held, *new, 0, torch.ones(2, 3), torch.ones(2, 3))
    fp8 = [part.to(torch.float8_e4m3fn) for part in held]
    for wrong in (torch.ones(3), torch.ones(2, 3).double(), torch.ones(2, 3, 2)[..., 0], torch.ones(1, 3).expand(2, 3)):
        with pytest.raises(ValueError, match=r"with a scale of .*float32 \[B, Hkv\], contiguous"):
            write_kv(*fp8, *new, 0, wrong, torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be equal"):
        write_kv(*held, *(part[:1] for part in new), 0)
    assert (held[0] == 7).all()
