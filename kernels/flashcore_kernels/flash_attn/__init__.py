"""FlashAttention's own functions over flashcore's kernels: change the import, and the calls stay.

Signatures are FlashAttention-2's, and what FlashAttention-3 adds comes behind it by keyword. Semantics are theirs:
causal and windows are aligned to the last query and the last key; a query that sees no key gives zeros, and a
log-sum-exp of -inf (as in FlashAttention-3). Nothing here synchronises with the device but the padding functions.
"""

from .dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .install import install_as_flash_attn, uninstall_as_flash_attn
from .kvcache import flash_attn_with_kvcache
from .padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from .varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "index_put_first_axis",
    "install_as_flash_attn",
    "pad_input",
    "uninstall_as_flash_attn",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]
