"""A mask that is held as a KeyRange, and becomes the dense mask where anything but attention looks at it."""

import torch
from flashcore_kernels import make_key_range, visible
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
# What hands a mask on as it is, with the mask as its first argument.
_HANDED_ON = (_aten.detach.default, _aten.alias.default)


class RangeMask(torch.Tensor):
    """A bool mask `[B, 1, Q, K]`, True where a query sees a key, whose Q * K values nobody has written down yet.

    It has the shape, dtype and device of the mask that `sdpa` would get. Models that hand their mask on unread keep it
    small; in those that slice it, add to it or copy it, the first operator gets the dense mask, and so does everything
    after.

    Attributes:
        hides_nothing: every query sees every key, as whoever made this knew without looking at values. Attention then
            needs no KeyRange, and its kernels are quicker without.
    """

    hides_nothing: bool
    _key_range: torch.Tensor | None
    _dense: torch.Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, key_range: torch.Tensor, num_queries: int, num_keys: int):
        return cls._of(key_range, key_range.shape[0], num_queries, num_keys, key_range.device)

    @classmethod
    def of_everything(cls, batch_size: int, num_queries: int, num_keys: int, device: torch.device) -> "RangeMask":
        """The mask that hides nothing, whose KeyRange is made where somebody wants it."""
        return cls._of(None, batch_size, num_queries, num_keys, device)

    @classmethod
    def _of(cls, key_range, batch_size: int, num_queries: int, num_keys: int, device: torch.device) -> "RangeMask":
        shape = (batch_size, 1, num_queries, num_keys)
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._key_range, mask._dense, mask.hides_nothing = key_range, None, key_range is None
        return mask

    @property
    def key_range(self) -> torch.Tensor:
        """int32, the KeyRange (see flashcore_kernels.key_range)."""
        if self._key_range is None:
            self._key_range = make_key_range(self.shape[0], self.shape[3], device=self.device)
        return self._key_range

    def dense(self) -> torch.Tensor:
        """The mask with its values, bool `[B, 1, Q, K]`: made once, and the same tensor each time."""
        if self._dense is None:
            self._dense = visible(self.key_range, *self.shape[2:])
        return self._dense

    def _with(self, key_range: torch.Tensor | None, device: torch.device) -> "RangeMask":
        """The same mask in another tensor, with whatever was noted on this one."""
        mask = self._of(None if self.hides_nothing else key_range, self.shape[0], *self.shape[2:], device)
        for name, note in vars(self).items():
            vars(mask).setdefault(name, note)
        return mask

    def is_read(self) -> bool:
        """Whether the dense mask was given out. Whoever has it may have written into it, which no KeyRange shows."""
        return self._dense is not None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        mask = args[0] if args else None
        unread = isinstance(mask, RangeMask) and not mask.is_read()
        if unread and function in _HANDED_ON:
            # A tensor of its own, as PyTorch wants of a view.
            return mask._with(mask._key_range, mask.device)
        if unread and function is _aten._to_copy.default and (kwargs or {}).get("dtype") in (None, torch.bool):
            # A device_map's hooks move masks to where their layer is.
            device, key_range = kwargs.get("device") or mask.device, mask._key_range
            if not mask.hides_nothing:
                key_range = key_range.to(device, copy=True, non_blocking=kwargs.get("non_blocking", False))
            return mask._with(key_range, device)
        args, kwargs = tree_map_only(RangeMask, RangeMask.dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"RangeMask({list(self.shape)}, device='{self.device}')"

    # What asks for the values without an operator.

    def __reduce_ex__(self, protocol):
        return self.dense().__reduce_ex__(protocol)

    def __deepcopy__(self, memo) -> torch.Tensor:
        return self.dense().clone()

    def numpy(self, **kwargs):
        return self.dense().numpy(**kwargs)

    def tolist(self):
        return self.dense().tolist()

    def data_ptr(self) -> int:
        return self.dense().data_ptr()

    # torch.compile takes a part of a model that is given one as if it were given the KeyRange.

    def __tensor_flatten__(self):
        if type(self._dense) is torch.Tensor:  # and not one of a trace, which keeps what is written in it
            raise NotImplementedError(
                "a part of a model that torch.compile compiles got flashcore's mask after other parts had read it. "
                "Supported are a mask that only attention reads, and compiling the whole model: compile that, or load "
                "this model with attn_implementation='sdpa'."
            )
        return ["key_range"], self.hides_nothing

    @staticmethod
    def __tensor_unflatten__(inner: dict, hides_nothing: bool, outer_size, outer_stride) -> "RangeMask":
        mask = RangeMask(inner["key_range"], *outer_size[2:])
        mask.hides_nothing = hides_nothing
        return mask


@torch._dynamo.allow_in_graph
def range_or_dense(mask: RangeMask) -> torch.Tensor:
    """The KeyRange (int32), or bool `[B, 1, Q, K]` where the dense mask was given out, which may have been written in.

    torch.compile runs this as it stands and at its place among what reads the mask; an attribute it would take from the
    mask as it came in.
    """
    return mask.dense() if mask.is_read() else mask.key_range


def can_be_made() -> bool:
    """Whether a RangeMask made now meets operators that run at once, and not a tracer, a mode or a transform.

    Those get the dense mask: what they record must hold the operators that make it.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
    )
