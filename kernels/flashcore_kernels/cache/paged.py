"""Attention on keys and values that are kept in pages, for servers: many sequences of any lengths in one launch."""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..choose import KERNEL_DTYPES, MAX_HEAD_DIM
from ..device import Device, device_of, goes_past_dispatcher
from ..fallback import note_fallback, torch_attention
from ..op import count_path
from ..paged_problem import PagedProblem
from ..problem import Inputs, Window, check_options, check_problem
from ..runtime.launch import is_planning
from .kv_write import E4M3_LARGEST
from .paged_kernels import serve_pages

_library = torch.library.Library("flashcore", "FRAGMENT")
_library.define(
    "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_table, Tensor cu_seqlens_q, "
    "Tensor key_lengths, Tensor? new_key, Tensor? new_value, int ring, int max_queries, int left, int right, "
    "float scale, float softcap, Tensor? sinks, Tensor? key_scale, Tensor? value_scale, bool return_lse) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "write_pages(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor key, Tensor value, Tensor block_table, "
    "Tensor cu_seqlens_q, Tensor key_lengths, int ring, Tensor? key_scale, Tensor? value_scale) -> ()"
)


class Pages(NamedTuple):
    """The keys and values of many sequences, and where each of them has its own.

    Attributes:
        key, value: `[pages, page_size, Hkv, D]` and `[pages, page_size, Hkv, Dv]`, any strides with a unit innermost
            one; in the dtype of the queries, or float8_e4m3fn. page_size is a power of two.
        block_table: int32 `[S, W]`: entry w of line s is the page that holds keys [w * page_size, (w + 1) * page_size)
            of sequence s. Entries past a sequence's last key (-1, by custom) are never read.
        cu_seqlens_q: int32 `[S + 1]`: sequence s has queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]) of a call. What is
            left of the queries, and sequences without any, are padding.
        key_lengths: int32 `[S]`, keys of each sequence, those of its queries included; or `[S + 1]`, their sums from 0
            on. -1 and 0: none, and nothing is read or written.
        ring: a layer with a sliding window may keep its last keys alone: key p of a sequence then lies in slot
            p % ring of its line. 0: every key has a slot.
        key_scale, value_scale: float32 `[Hkv]`, with float8_e4m3fn: what elements are multiplied with.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    key_lengths: torch.Tensor
    ring: int = 0
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


def paged_attention(
    query: torch.Tensor,
    pages: Pages,
    *,
    new_key: torch.Tensor | None = None,
    new_value: torch.Tensor | None = None,
    max_queries: int | None = None,
    is_causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(cap(scale * Q K^T) + mask) V for packed queries, each on the keys of its own sequence.

    The queries of a sequence are its last tokens: of n queries and L keys, query i stands at key L - n + i. Nothing is
    read on the host, so that one CUDA graph serves all lengths and every mixture of prompts and single tokens that
    have the same shapes. A sequence's answer has the same bits in whatever batch it comes.

    Args:
        query: `[T, H, D]`; H is a multiple of Hkv. Float16, bfloat16 or float32.
        pages: see `Pages`.
        new_key, new_value: `[T, Hkv, D]` and `[T, Hkv, Dv]`: the keys and values of the queries, where the pages do not
            hold them yet. In a ring they would overwrite keys that earlier ones of them see: attend first, then
            `write_pages`. Without them the pages must hold all keys.
        max_queries: most queries of any sequence, where the caller knows: 1 spares the launch the programs for
            prompts. A sequence with more then gets no answer, so None where you do not know.
        is_causal, window, scale, softcap, sinks: as in `flashcore_kernels.attention`. The window must fit the ring.
        return_lse: also return the log-sum-exp.

    Returns:
        output `[T, H, Dv]` in query's dtype, contiguous; with return_lse also float32 `[H, T]`. Rows without a key and
        padding are 0, their log-sum-exp -inf (or the sink's).

    Raises:
        ValueError: an argument does not fit; the message names it, what it was, and what is accepted.
        NotImplementedError: FLASHCORE_STRICT=1 is set and no kernel can serve the call.
    """
    left, right, scale, softcap = check_options(query.shape[-1], is_causal, window, scale, softcap)
    _check(query, pages, new_key, new_value, sinks)
    if pages.ring and not 0 <= left < pages.ring:
        raise ValueError(
            f"a ring of {pages.ring} slots with a window of {left + 1 if left >= 0 else 'no'} keys: a ring keeps the "
            "last keys alone, so a window of at most as many is needed"
        )
    arguments = (
        query, *pages[:5], new_key, new_value, pages.ring, query.shape[0] if max_queries is None else max_queries, left,
        right, scale, softcap, sinks, pages.key_scale, pages.value_scale, return_lse,
    )  # fmt: skip
    output, lse = (_attend if _goes_past(query) else torch.ops.flashcore.paged_attention)(*arguments)
    return (output, lse) if return_lse else output


def write_pages(pages: Pages, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the keys and values of a call's queries, a sequence's last ones, into their pages, in place.

    Args:
        pages: see `Pages`. Tokens whose entry of the table is -1 are left out. In a ring the last `ring` tokens of each
            sequence are written.
        key, value: `[T, Hkv, D]` and `[T, Hkv, Dv]`, any strides with a unit innermost one.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(None, pages, key, value, None)
    arguments = (
        pages.key, pages.value, key, value, *pages[2:5], pages.ring, pages.key_scale, pages.value_scale,
    )  # fmt: skip
    (_write if _goes_past(key) else torch.ops.flashcore.write_pages)(*arguments)


def _goes_past(tensor: torch.Tensor) -> bool:
    """Whether a call does without the dispatcher. It costs more than the launch, and is for those who listen to it."""
    if tensor.is_meta:
        return is_planning()
    return goes_past_dispatcher(tensor) and not torch.compiler.is_compiling()


def _device(tensor: torch.Tensor) -> Device:
    """What serves a call on this tensor; planned are launches on the GPU that is current."""
    return device_of(torch.device("cuda", torch.cuda.current_device()) if tensor.is_meta else tensor.device)


def _fail(what: str, got, accepted: str):
    raise ValueError(f"{what}: got {got}; {accepted}")


def _check(query, pages: Pages, new_key, new_value, sinks) -> None:
    key, value, table, cu_q, lengths = pages[:5]
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        _fail("shapes of the pages", [list(key.shape), list(value.shape)], "[pages, page_size, Hkv, D] is needed")
    num_kv_heads, page_size = key.shape[2], key.shape[1]
    if page_size & (page_size - 1) or 0 in key.shape or 0 in value.shape:
        _fail("shape of the pages", list(key.shape), "page_size must be a power of two, and no dimension 0")
    if table.dim() != 2 or table.dtype != torch.int32 or 0 in table.shape or table.stride(1) != 1:
        _fail(
            "block_table", f"{table.dtype} {list(table.shape)}", "int32 [sequences, entries] is needed, rows in a row"
        )
    num_sequences = table.shape[0]
    if tuple(cu_q.shape) != (num_sequences + 1,) or cu_q.dtype != torch.int32 or cu_q.stride(0) != 1:
        _fail("cu_seqlens_q", f"{cu_q.dtype} {list(cu_q.shape)}", f"int32 [{num_sequences + 1}] is needed")
    if lengths.dim() != 1 or lengths.shape[0] - num_sequences not in (0, 1) or lengths.dtype != torch.int32:
        _fail(
            "key_lengths", f"{lengths.dtype} {list(lengths.shape)}",
            f"int32 [{num_sequences}], or their sums [{num_sequences + 1}], is needed",
        )  # fmt: skip
    if lengths.stride(0) != 1:
        _fail("stride of key_lengths", lengths.stride(0), "1 is needed")
    fp8 = torch.float8_e4m3fn in (key.dtype, value.dtype)
    for name, scale in (("key_scale", pages.key_scale), ("value_scale", pages.value_scale)):
        if fp8 == (scale is None):
            _fail(name, None if scale is None else str(scale.dtype), "float8_e4m3fn alone has scales, and needs them")
        if fp8 and (tuple(scale.shape) != (num_kv_heads,) or scale.dtype != torch.float32):
            _fail(name, f"{scale.dtype} {list(scale.shape)}", f"float32 [{num_kv_heads}] is needed, one a KV head")
        if fp8 and not scale.is_contiguous():
            _fail(f"stride of {name}", scale.stride(0), "1 is needed, call .contiguous()")
    if pages.ring < 0 or pages.ring > table.shape[1] * page_size:
        _fail("ring", pages.ring, f"from 0 to the {table.shape[1] * page_size} slots of a line of the block table")
    if (new_key is None) != (new_value is None):
        _fail("new_key and new_value", "one of them", "give both, or neither")
    of = query if query is not None else new_key
    if of.dim() != 3 or 0 in of.shape:
        _fail("shape of the tokens", list(of.shape), "[tokens, heads, head_dim] is needed, and no dimension 0")
    wanted = [("new_key", new_key, key), ("new_value", new_value, value)] if new_key is not None else []
    for name, new, stored in wanted:
        if tuple(new.shape) != (of.shape[0], num_kv_heads, stored.shape[3]):
            _fail(name, list(new.shape), f"{[of.shape[0], num_kv_heads, stored.shape[3]]} is needed")
    if query is not None:
        if query.shape[1] % num_kv_heads or query.shape[2] != key.shape[3]:
            _fail(
                "query", list(query.shape),
                f"[T, H, {key.shape[3]}] is needed, H a multiple of the {num_kv_heads} heads of keys",
            )  # fmt: skip
        if sinks is not None and (tuple(sinks.shape) != (query.shape[1],) or not sinks.dtype.is_floating_point):
            _fail("sinks", f"{sinks.dtype} {list(sinks.shape)}", f"one logit a head, [{query.shape[1]}]")
        if sinks is not None and not sinks.is_contiguous():
            _fail("stride of sinks", sinks.stride(0), "1 is needed, call .contiguous()")
    states = [t for t in (query, new_key, new_value, *(() if fp8 else (key, value))) if t is not None]
    if len({t.dtype for t in states}) > 1 or not of.dtype.is_floating_point:
        _fail("dtypes of tokens and pages", sorted({str(t.dtype) for t in states}), "they must be the same")
    tensors = [*states, *(t for t in (*pages, sinks) if isinstance(t, torch.Tensor))]
    if len({t.device for t in tensors}) > 1:
        _fail("devices", sorted({str(t.device) for t in tensors}), "all tensors must be on the same one")


def _reason(dtype: torch.dtype, largest: int, fp8: bool, device: Device) -> str | None:
    """Why no kernel can serve this, or None where one can."""
    if device.kind == "torch":
        return device.reason
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {dtype}"
    if largest > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {largest}"
    if fp8 and device.kind == "cuda" and device.arch < 89:
        return f"keys in fp8 need compute capability 8.9 or newer, this GPU has {device.arch // 10}.{device.arch % 10}"
    return None


def _attend(
    query, key_pages, value_pages, block_table, cu_seqlens_q, key_lengths, new_key, new_value, ring, max_queries, left,
    right, scale, softcap, sinks, key_scale, value_scale, return_lse,
):  # fmt: skip
    """The operator's implementation on every device."""
    num_tokens, num_heads, head_dim = query.shape
    num_pages, page_size, num_kv_heads, value_dim = value_pages.shape
    fp8 = key_scale is not None
    device = _device(query)
    output, lse = _outputs(query, value_pages, return_lse)
    reason = _reason(query.dtype, max(head_dim, value_dim), fp8, device)
    if reason is None and scale <= 0.0:
        # The kernels take the largest product for the largest score.
        query = query * (-1.0 if scale < 0.0 else 0.0)
        scale = -scale or 1.0
    if reason is not None:
        note_fallback(reason)
        count_path("torch")
        pages = Pages(key_pages, value_pages, block_table, cu_seqlens_q, key_lengths, ring, key_scale, value_scale)
        _through_torch(
            query, pages, new_key, new_value, (left, right), scale, softcap, sinks, output, lse if return_lse else None
        )
        return output, lse
    query, new_key, new_value = (
        t if t is None or t.stride(2) == 1 else t.contiguous() for t in (query, new_key, new_value)
    )
    if key_pages.stride(3) != 1 or value_pages.stride(3) != 1:
        raise ValueError("the innermost stride of the pages must be 1: a copy of the pool would be no pool")
    if device.kind == "interpreter" and query.dtype == torch.bfloat16:
        # NumPy has no bfloat16, and the interpreter would multiply its bit patterns.
        query = query.float()
        new_key, new_value = (None if t is None else t.float() for t in (new_key, new_value))
        if not fp8:
            key_pages, value_pages = key_pages.float(), value_pages.float()
    problem = PagedProblem(
        num_tokens=num_tokens, num_sequences=block_table.shape[0], num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, value_dim=value_dim, page_size=page_size, num_pages=num_pages,
        table_width=block_table.shape[1], dtype=query.dtype, ring=ring, new_keys=new_key is not None,
        cumulative=key_lengths.shape[0] == block_table.shape[0] + 1, max_queries=max_queries, scale=scale,
        softcap=softcap, left=left, right=right, has_sinks=sinks is not None, fp8=fp8,
    )  # fmt: skip
    with _on(query):
        serve_pages(
            problem, device, query, key_pages, value_pages, output, lse if return_lse else None, new_key, new_value,
            block_table, cu_seqlens_q, key_lengths, sinks, key_scale, value_scale,
        )  # fmt: skip
    return output, lse


def _write(
    key_pages, value_pages, key, value, block_table, cu_seqlens_q, key_lengths, ring, key_scale, value_scale
) -> None:
    device = _device(key)
    fp8 = key_scale is not None
    if device.kind == "cuda" and not (fp8 and device.arch < 89):
        from ..portable.paged.write import run_write_pages  # needs Triton

        key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (key, value))
        with _on(key):
            run_write_pages(
                key_pages, value_pages, key, value, block_table, cu_seqlens_q, key_lengths, ring, key_scale, value_scale
            )
        return
    pages = Pages(key_pages, value_pages, block_table, cu_seqlens_q, key_lengths, ring)
    tokens, page, inside = _slots(pages, key.shape[0])
    for stored, states, scale in ((key_pages, key, key_scale), (value_pages, value, value_scale)):
        states = states[tokens]
        if fp8:
            states = (states.float() / scale[:, None]).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
            stored, states = stored.view(torch.uint8), states.view(torch.uint8)
        stored[page, inside] = states


def _on(tensor: torch.Tensor):
    elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else nullcontext()


def _lengths(pages: Pages) -> torch.Tensor:
    """int64 `[S]`."""
    lengths = pages.key_lengths.long()
    return lengths.diff() if lengths.shape[0] == pages.block_table.shape[0] + 1 else lengths


def _slots(pages: Pages, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens that are written, their pages, their rows in these)."""
    bounds, lengths, page_size = pages.cu_seqlens_q.long(), _lengths(pages), pages.key.shape[1]
    token = torch.arange(num_tokens, device=bounds.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1
    keep = sequence < lengths.shape[0]
    sequence = sequence.clamp(max=lengths.shape[0] - 1)
    place = lengths[sequence] - bounds[sequence + 1] + token
    keep &= (place >= 0) & (lengths[sequence] > 0)
    slot = place.clamp(min=0)
    if pages.ring:
        keep &= place >= lengths[sequence] - pages.ring
        slot = slot % pages.ring
    entry = slot // page_size
    keep &= entry < pages.block_table.shape[1]
    page = pages.block_table[sequence, entry.clamp(max=pages.block_table.shape[1] - 1)].long()
    keep &= (page >= 0) & (page < pages.key.shape[0])
    return token[keep], page[keep], (slot % page_size)[keep]


def _through_torch(query, pages: Pages, new_key, new_value, window, scale, softcap, sinks, output, lse) -> None:
    """The same through PyTorch, one sequence after the other; lengths are read on the host."""
    output.zero_()
    if lse is not None:
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks[:, None].float().expand_as(lse))
    bounds, page_size = pages.cu_seqlens_q.tolist(), pages.key.shape[1]
    for s, length in enumerate(_lengths(pages).tolist()):
        begin, end = bounds[s], bounds[s + 1]
        if begin == end or length <= 0:
            continue
        stored = length if new_key is None else max(length - (end - begin), 0)
        first = max(stored - pages.ring, 0) if pages.ring else 0
        slot = torch.arange(first, stored, device=query.device)
        slot = slot % pages.ring if pages.ring else slot
        page = pages.block_table[s, slot // page_size].long()
        keys, values = (
            pool.view(torch.uint8)[page, slot % page_size].view(pool.dtype)
            if pool.dtype == torch.float8_e4m3fn
            else pool[page, slot % page_size]
            for pool in (pages.key, pages.value)
        )
        if new_key is not None:
            skipped = max((end - begin) - length, 0)
            keys = torch.cat([keys, new_key[begin + skipped : end]])
            values = torch.cat([values, new_value[begin + skipped : end]])
        scales = (None, None) if pages.key_scale is None else (pages.key_scale[None], pages.value_scale[None])
        inputs = Inputs(
            query[begin:end].transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None],
            sinks=sinks, key_scale=scales[0], value_scale=scales[1],
        )  # fmt: skip
        problem = check_problem(inputs, False, window, scale, softcap)
        answer, answer_lse = torch_attention(problem, inputs, lse is not None)
        output[begin:end] = answer[0].transpose(0, 1)
        if lse is not None:
            lse[:, begin:end] = answer_lse[0]


def _outputs(query, value_pages, return_lse):
    num_tokens, num_heads, _ = query.shape
    output = query.new_empty(num_tokens, num_heads, value_pages.shape[3])
    return output, query.new_empty((num_heads, num_tokens) if return_lse else (0,), dtype=torch.float32)


def _fake(
    query, key_pages, value_pages, block_table, cu_seqlens_q, key_lengths, new_key, new_value, ring, max_queries, left,
    right, scale, softcap, sinks, key_scale, value_scale, return_lse,
):  # fmt: skip
    return _outputs(query, value_pages, return_lse)


for _key in ("CPU", "CUDA"):
    _library.impl("paged_attention", _attend, _key)
    _library.impl("write_pages", _write, _key)
torch.library.register_fake("flashcore::paged_attention", _fake, lib=_library)
torch.library.register_fake("flashcore::write_pages", lambda *arguments: None, lib=_library)
