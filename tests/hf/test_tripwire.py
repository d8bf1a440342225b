"""A new Transformers that asks something new of backends fails here, with the list of what the adapter does not know.

When it fires: find out what the new thing means for flashcore (take it, refuse it, or see that it does not matter),
do that in attention.py, arguments.py, patterns.py, row_ranges.py or backend.py, add a test, and only then add the name
below.
"""

import inspect
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import transformers

import flashcore_hf
from flashcore_hf import arguments, attention, backend, compat, patterns, row_ranges

from . import scan

ROOT = Path(transformers.__file__).parent

# Parts of masks: those that a KeyRange says, those that become a dense mask, and the means to combine them.
IN_A_KEY_RANGE = {
    "causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay",
    "sliding_window_causal_mask_function", "sliding_window_bidirectional_overlay",
    "sliding_window_bidirectional_mask_function", "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence", "and_masks", "or_masks", "chunked_overlay", "_legacy_chunked_overlay",
    "chunked_causal_mask_function", "blockwise_overlay",
}  # fmt: skip
DENSE = {"padding_mask_function", "add_offsets_to_mask_function"}
MASK_MAKER_ARGUMENTS = {
    "config", "inputs_embeds", "input_embeds", "attention_mask", "past_key_values", "cache", "position_ids",
    "layer_idx", "or_mask_function", "and_mask_function", "block_sequence_ids", "encoder_hidden_states",
    "cache_position", "allow_is_causal_skip", "allow_is_bidirectional_skip",
}  # fmt: skip
REQUEST = {
    "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "cache_position", "mask_function", "attention_mask",
    "allow_is_causal_skip", "allow_is_bidirectional_skip", "dtype", "config", "use_vmap", "device", "local_size",
}  # fmt: skip


def known_arguments() -> set[str]:
    """What the attention function takes or knows to leave alone."""
    taken = {p.name for p in inspect.signature(attention.flashcore_attention).parameters.values()}
    return (taken - {"kwargs"}) | arguments.passing_arguments()


# How often each file asks for "flash" in a name, at most over the versions that were looked at: towers that then pass
# packed images (taken), tables of attention classes and models without the interface (refused), calls that fall back to
# sdpa for an additive mask (right), and Transformers' own loading of kernels (stepped past in backend.py).
KNOWN_FLASH_TESTS = Counter(json.loads((Path(__file__).parent / "known_flash_tests.json").read_text()))


def unknown(root: Path) -> list[str]:
    """Everything under `root` that asks of backends what the adapter does not know."""
    found = scan.attention_arguments(root)
    parts = scan.mask_parts(root)
    news = [f"attention argument '{a}' in {sorted(found[a])}" for a in sorted(found.keys() - known_arguments())]
    known_parts = IN_A_KEY_RANGE | DENSE | {f"argument {name}" for name in MASK_MAKER_ARGUMENTS}
    news += [f"masking_utils: {part}" for part in sorted(parts - known_parts)]
    news += [f"mask request keyword '{keyword}'" for keyword in sorted(scan.mask_requests(root) - REQUEST)]
    more = scan.flash_tests(root) - KNOWN_FLASH_TESTS
    return news + [f"{file}: {count} new tests for 'flash' in a name" for file, count in sorted(more.items())]


def require_nothing_new() -> None:
    """Fail where the installed Transformers has what the adapter does not know."""
    news = unknown(ROOT)
    assert not news, f"Transformers {transformers.__version__} has what flashcore does not know:\n" + "\n".join(news)


def test_nothing_new_is_asked_of_backends():
    if newer := compat.untested_version():
        pytest.skip(f"newer than tested: {newer} (tested: {compat.NEWEST_TESTED}); see `nox -s newest`")
    require_nothing_new()


@pytest.mark.newest
def test_nothing_new_is_asked_by_the_newest():
    """The same in a Transformers newer than any tested: a job of its own, for whoever works on flashcore."""
    require_nothing_new()


def test_a_newer_version_fails_only_its_own_job(monkeypatch):
    """Next month's Transformers must not fail the tests of a user, and what was tested must hold nothing unknown."""
    monkeypatch.setattr(f"{__name__}.unknown", lambda root: ["attention argument 'key_temperature' in ['new']"])
    # Not of the module here: importing some of its own replaces Transformers in sys.modules.
    monkeypatch.setattr(compat.transformers, "__version__", compat.NEWEST_TESTED)
    for check in (test_nothing_new_is_asked_of_backends, test_nothing_new_is_asked_by_the_newest):
        with pytest.raises(AssertionError, match="key_temperature"):
            check()
    monkeypatch.setattr(compat.transformers, "__version__", "99.0.0")
    with pytest.raises(pytest.skip.Exception, match="newer than tested: 99.0.0"):
        test_nothing_new_is_asked_of_backends()
    with pytest.raises(AssertionError, match="key_temperature"):
        test_nothing_new_is_asked_by_the_newest()


PLANTED = """
class FlashAttentionLayer(nn.Module):
    def forward(self, query, key, value, attention_mask, **kwargs):
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        if "flash" in self.config._attn_implementation:
            attention_mask = None
        return attention_interface(self, query, key, value, attention_mask, scaling=1.0, key_temperature=self.t)
"""
PLANTED_MASKS = """
def dilated_overlay(step):
    ...

def create_causal_mask(config, inputs_embeds, dilation=None):
    return mask_interface(batch_size=1, dilation=dilation)
"""


def planted(root: Path, model: str, masks_end: str) -> list[str]:
    """What is unknown in a tree that has `model`, and `masks_end` after masking_utils, but not without the two.

    A Transformers newer than any tested may have an unknown mask argument of its own.
    """
    plain, changed = root / "plain", root / "changed"
    path = changed / "models" / "new" / "modeling_new.py"
    path.parent.mkdir(parents=True)
    path.write_text(model)
    plain.mkdir()
    shutil.copy(ROOT / "masking_utils.py", plain)
    (changed / "masking_utils.py").write_text((ROOT / "masking_utils.py").read_text() + masks_end)
    before = unknown(plain)
    return [news for news in unknown(changed) if news not in before]


def test_it_fires_on_planted_changes(tmp_path):
    assert planted(tmp_path, PLANTED, PLANTED_MASKS) == [
        "attention argument 'key_temperature' in ['new']",
        "masking_utils: argument dilation",
        "masking_utils: dilated_overlay",
        "mask request keyword 'dilation'",
        "models/new/modeling_new.py: 1 new tests for 'flash' in a name",
    ]


def test_it_is_quiet_without_them(tmp_path):
    """The control: the same tree without the planted words."""
    assert (
        planted(tmp_path, PLANTED.replace(", key_temperature=self.t", "").replace('"flash" in', '"eager" in'), "") == []
    )


def test_the_scan_sees_what_is_there():
    """A scan that reads nothing would never fire."""
    arguments = scan.attention_arguments(ROOT)
    assert len(arguments["scaling"]) > 50 and "llama" in arguments["scaling"] and "gemma2" in arguments["softcap"]
    assert {"causal_mask_function", "sliding_window_overlay", "argument attention_mask"} <= scan.mask_parts(ROOT)
    assert {"kv_length", "mask_function", "attention_mask"} <= scan.mask_requests(ROOT)
    assert scan.flash_tests(ROOT)["modeling_utils.py"] > 0


@pytest.mark.parametrize(
    "name",
    sorted(
        IN_A_KEY_RANGE
        - {
            "sliding_window_causal_mask_function", "sliding_window_bidirectional_mask_function",
            "chunked_causal_mask_function",
        }
    ),
)  # fmt: skip
def test_what_is_called_recognised_is(name):
    """The lists above are no words alone: each of these is read by name."""
    assert re.search(rf"\b{name}\b", inspect.getsource(patterns) + inspect.getsource(row_ranges))


class TestUntestedVersion:
    @pytest.fixture(autouse=True)
    def restored(self):
        yield
        flashcore_hf.disable()
        backend._warned_version = True
        flashcore_hf.enable()

    def enable_under(self, monkeypatch, version: str) -> list[str]:
        flashcore_hf.disable()
        backend._warned_version = False
        monkeypatch.setattr(compat.transformers, "__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            flashcore_hf.enable()
            flashcore_hf.disable()
            flashcore_hf.enable()
        return [str(w.message) for w in caught]

    @pytest.mark.parametrize("version", ["5.25.0", "6.0.0", "5.99.0.dev0"])
    def test_newer_warns_once(self, monkeypatch, version):
        messages = self.enable_under(monkeypatch, version)
        assert len(messages) == 1 and version in messages[0] and compat.NEWEST_TESTED in messages[0]

    @pytest.mark.parametrize("version", ["5.24.0", "5.24.4", "4.57.6"])
    def test_tested_ones_do_not(self, monkeypatch, version):
        assert self.enable_under(monkeypatch, version) == []
