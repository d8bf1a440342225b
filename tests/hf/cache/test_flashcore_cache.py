"""FlashCoreCache beside DynamicCache: the same tokens and the same contents, without concatenation."""

import pytest
import torch
import transformers
from flashcore_kernels import op, run
from flashcore_kernels.device import Device
from packaging.version import Version
from transformers import DynamicCache

from ..compare import cache_of, greedy, named
from ..models import VOCABULARY, model_pair, prompts, tiny_config

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("FlashCoreCache needs 4.57", allow_module_level=True)

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.cache.layer import CROP_TAKES_LENGTH, FIRST_CAPACITY, MARGIN, FlashCoreLayer
from flashcore_hf.cache.switch import use_flashcore_cache

MODELS = ("llama", "mistral", "gemma3_text")


@pytest.fixture
def torch_attention(monkeypatch):
    """PyTorch in place of the interpreter, which is slow; the views of a cache are tried with kernels elsewhere."""
    for module in (op, run):
        monkeypatch.setattr(module, "device_of", lambda device: Device("torch", reason="this test is about the cache"))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return model_pair(request.param)[1]


def tokens(batch_size: int, count: int, seed: int = 0, heads: int = 2, head_dim: int = 8, value_dim: int = 4):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch_size, heads, count, head_dim, generator=generator),
        torch.randn(batch_size, heads, count, value_dim, generator=generator),
    )


def layer_pair(window: int | None, **options):
    """(ours, Transformers')"""
    return FlashCoreLayer(window, **options), DynamicSlidingWindowLayer(window) if window else DynamicLayer()


def crop(layer, remove: int) -> None:
    layer.crop(layer.get_seq_length() - remove if CROP_TAKES_LENGTH else -remove)


def assert_same(ours, other) -> None:
    assert torch.equal(ours.keys, other.keys) and torch.equal(ours.values, other.values)
    assert ours.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("ways", ["greedy", "sampled", "beams", "prompt lookup"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
def test_generate(model, ways, padding, torch_attention):
    """The prompt is longer than the sliding window already."""
    options = {
        "greedy": {},
        "sampled": {"do_sample": True},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCABULARY - 1},
    }[ways]
    ids, mask = prompts(3, 9, padding)
    if ways == "prompt lookup":
        ids = torch.arange(3, 9).repeat(3)[None]
        mask = torch.ones_like(ids)
    answers = []
    # Up to 5.4, sliding layers of a DynamicCache cannot be cropped, and generate() has full ones instead.
    for cache in (DynamicCache() if ways == "prompt lookup" else None, FlashCoreCache(model.config)):
        torch.manual_seed(3)
        answers.append(greedy(model, ids, mask, 20, **named(cache), **options))
    assert torch.equal(*answers)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_kernels_read_the_views(model_type, paths):
    eager, model = model_pair(model_type)
    ids, mask = prompts(2, 9, "left")
    assert torch.equal(greedy(model, ids, mask, 8, **named(FlashCoreCache(model.config))), greedy(eager, ids, mask, 8))
    assert paths["torch"] == 0 and paths.total() > 0


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
def test_a_second_turn_continues_the_first(model, torch_attention):
    ids, mask = prompts(2, 9)
    answers = []
    for cache in (DynamicCache(config=model.config), FlashCoreCache(model.config)):
        first = greedy(model, ids, mask, 5, **named(cache))
        ids_two = torch.cat([first, ids[:, :4]], dim=1)
        answers.append(greedy(model, ids_two, torch.ones_like(ids_two), 5, **named(cache)))
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
def test_as_the_default_of_generate(model, torch_attention):
    """One line on, one line off; other caches are left alone."""
    ids, mask = prompts(2, 9, "left")

    def run(**options):
        return greedy(model, ids, mask, 6, return_dict_in_generate=True, **options)

    expected = run()
    before = {name for name in vars(model) if "prepare" in name}
    assert use_flashcore_cache(model) is model
    got = run()
    assert type(cache_of(got)) is FlashCoreCache
    assert torch.equal(got.sequences, expected.sequences)
    assert type(cache_of(run(**named(DynamicCache(config=model.config))))) is DynamicCache
    assert type(cache_of(run(cache_implementation="static"))).__name__ == "StaticCache"
    use_flashcore_cache(model, False)
    assert type(cache_of(run())) is DynamicCache
    assert {name for name in vars(model) if "prepare" in name} == before == set()


@pytest.mark.parametrize("window", [None, 6, 300])
@pytest.mark.parametrize("sizes", [[9] + [1] * 200, [3, 5, 1, 400, 1, 1, 7], [700, 1, 1, 2, 300, 1]], ids=str)
def test_contents(window, sizes):
    """Keys and values of every step; long prompts, growth, and old tokens dropped on the way."""
    ours, other = layer_pair(window)
    for step, count in enumerate(sizes):
        pair = tokens(2, count, seed=step)
        size, offset = ours.get_mask_sizes(count)
        for got, want in zip(ours.update(*pair), other.update(*pair)):
            assert torch.equal(got, want)
            assert size == got.shape[2] and offset == ours.get_seq_length() - size
        assert_same(ours, other)
    if window:
        assert ours.capacity <= max(2 * (window + MARGIN), FIRST_CAPACITY)


def test_a_token_moves_nothing():
    """1,000 tokens: buffers change when they double, and only then."""
    layer = FlashCoreLayer()
    addresses = set()
    for step in range(1000):
        layer.update(*tokens(1, 1, seed=step % 7))
        addresses.add((layer.key_buffer.data_ptr(), layer.capacity))
    assert sorted(capacity for _, capacity in addresses) == [256, 512, 1024]


@pytest.mark.parametrize("window", [None, 6])
def test_crop(window):
    """Candidates are taken back, also across the window's edge and after 100 tokens that were dropped."""
    ours, other = layer_pair(window)
    if window is not None and not hasattr(other, "activate_past_recording"):
        other = DynamicLayer()  # older ones cannot crop a window; what is visible is compared below
    if hasattr(other, "activate_past_recording"):
        other.activate_past_recording()
    for step, (count, remove) in enumerate([(9, 0), (5, 3), (1, 1), (100, 2), (150, 4), (6, 5)]):
        pair = tokens(2, count, seed=step)
        for layer in (ours, other):
            layer.update(*pair)
            crop(layer, torch.tensor(remove) if layer is ours else remove)  # as assisted decoding does
        assert type(ours.length) is int
        assert ours.get_seq_length() == other.get_seq_length()
        visible = ours.keys.shape[2]
        assert torch.equal(ours.keys, other.keys[:, :, other.keys.shape[2] - visible :])
        assert visible == (other.keys.shape[2] if window is None else min(window - 1, ours.length))
    if window:
        with pytest.raises(ValueError, match="activate_past_recording"):
            crop(ours, 200)
        assert ours.get_seq_length() == other.get_seq_length()


def test_past_recording_keeps_whatever_may_be_taken_back():
    layer = FlashCoreLayer(6)
    reference, _ = tokens(1, 500)
    layer.update(*tokens(1, 10))
    layer.update(reference[:, :, :90], reference[:, :, :90, :4])
    layer.activate_past_recording()
    for step in range(90, 490):
        layer.update(reference[:, :, step : step + 1], reference[:, :, step : step + 1, :4])
    crop(layer, 400)
    assert torch.equal(layer.keys, reference[:, :, 85:90])
    # Without it, so many tokens are gone.
    layer = FlashCoreLayer(6)
    for step in range(490):
        layer.update(reference[:, :, step : step + 1], reference[:, :, step : step + 1, :4])
    with pytest.raises(ValueError, match="has dropped the tokens"):
        crop(layer, 400)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
def test_batch_operations(window, dtype):
    layer = FlashCoreLayer(window, dtype=dtype)
    layer.update(*tokens(3, 9))
    layer.update(*tokens(3, 1))

    def contents():
        return [part.clone() for part in layer.copied()] if layer.length else None

    layer.dtype = torch.float32
    keys, values = contents()
    address = layer.key_buffer.data_ptr()
    beams = torch.tensor([2, 0, 0])
    layer.reorder_cache(beams)
    assert layer.key_buffer.data_ptr() == address
    assert torch.equal(contents()[0], keys[beams]) and torch.equal(contents()[1], values[beams])
    layer.batch_repeat_interleave(2)
    assert torch.equal(contents()[0], keys[beams].repeat_interleave(2, dim=0))
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert torch.equal(contents()[0], keys[beams].repeat_interleave(2, dim=0)[[5, 0]])
    layer.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(contents()[1], values[[2]])
    layer.update(*tokens(1, 1))
    assert layer.get_seq_length() == 11


def test_overflow_loses_nothing(model):
    cache = FlashCoreCache(model.config, max_length=12)
    ids, mask = prompts(2, 9)
    with torch.no_grad():
        model(ids, attention_mask=mask, **named(cache))
        before = [(layer.keys.clone(), layer.length) for layer in cache.layers]
        with pytest.raises(ValueError, match="holds 9 tokens and has max_length=12, and 4 more"):
            model(ids[:, :4], attention_mask=torch.ones(2, 13, dtype=torch.long), **named(cache))
        for layer, (keys, length) in zip(cache.layers, before):
            assert torch.equal(layer.keys, keys) and layer.length == length
        model(ids[:, :3], attention_mask=torch.ones(2, 12, dtype=torch.long), **named(cache))
    assert cache.get_seq_length() == 12
    assert all(layer.capacity <= FIRST_CAPACITY for layer in cache.layers)


@pytest.mark.parametrize("length", [4, 9, 200])
def test_to_and_from_dynamic(length):
    config = tiny_config("gemma3_text")
    dynamic = DynamicCache(config=config)
    for step, count in enumerate((length, 1)):
        for index in range(len(dynamic.layers)):
            dynamic.update(*tokens(2, count, seed=step), index)
    ours = FlashCoreCache.from_dynamic(dynamic)
    back = ours.to_dynamic()
    for index, (a, b, c) in enumerate(zip(ours.layers, dynamic.layers, back.layers)):
        assert type(b) is type(c)
        assert_same(a, b)
        assert_same(c, b)
        assert c.keys.data_ptr() != a.key_buffer.data_ptr()
        more = tokens(2, 3, seed=9)
        wanted = dynamic.update(*more, index)
        for cache in (ours, back):
            for got, want in zip(cache.update(*more, index), wanted):
                assert torch.equal(got, want)


def test_reset_keeps_the_buffers():
    layer = FlashCoreLayer()
    layer.update(*tokens(2, 300))
    address = layer.key_buffer.data_ptr()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys.shape[2] == 0
    layer.update(*tokens(2, 20))
    assert layer.key_buffer.data_ptr() == address
    # Another batch makes new ones.
    layer.reset()
    layer.update(*tokens(3, 20))
    assert layer.keys.shape[0] == 3


def test_refusals(model):
    with pytest.raises(ValueError, match="float16"):
        FlashCoreCache(model.config, dtype=torch.float16)
    with pytest.raises(ValueError, match="max_length: got 0"):
        FlashCoreCache(model.config, max_length=0)
    layer = FlashCoreLayer()
    layer.update(*tokens(2, 3))
    with pytest.raises(ValueError, match="another batch or model"):
        layer.update(*tokens(1, 1))  # would broadcast
    assert layer.get_seq_length() == 3
    with pytest.raises(ValueError, match="gradients"):
        layer.update(*(part.requires_grad_() for part in tokens(2, 1)))
