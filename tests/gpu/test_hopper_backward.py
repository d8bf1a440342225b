"""The Hopper backward against float64 autograd: features, odd lengths, random calls; its bits; negative controls."""

import random

import pytest
import torch
import torch.nn.functional as F
from flashcore_kernels import make_key_range, make_row_ranges
from flashcore_kernels.choose import choose_backward
from flashcore_kernels.device import device_of
from flashcore_kernels.naive import visible_mask
from flashcore_kernels.problem import Inputs, check_problem

launch = pytest.importorskip("flashcore_kernels.hopper.backward.launch")

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Hopper backward is for compute capability 9.0", allow_module_level=True)

# Gradients by the project's rule: at most so many times the error of PyTorch's fused attention, and two roundings.
MAX_RATIO, RMS_RATIO = 3.0, 2.0
GRADIENTS = ("dq", "dk", "dv", "dsinks")


class Case:
    """A call with its output, log-sum-exp and gradients in float64, and those of PyTorch in its own dtype.

    Args:
        heads: (H, Hkv).
        key_range: of B, Q and K; keys that no query sees are NaN then. Queries that see no key are, always, and so is
            their dO.
        with_lse, with_sinks: whether a gradient comes through the lse, and whether heads have sinks, which want theirs.
        transposed: heads inside the sequence in memory.
        arguments: of `check_problem`.
    """

    def __init__(
        self, batch_size, heads, num_queries, num_keys, head_dim, value_dim=None, dtype=torch.bfloat16, seed=0,
        key_range=None, with_lse=False, with_sinks=False, transposed=False, **arguments,
    ):  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(seed)
        value_dim = value_dim or head_dim

        def draw(num_heads, length, *columns):
            shape = (batch_size, length, num_heads) if transposed else (batch_size, num_heads, length)
            drawn = torch.randn(*shape, *columns, device="cuda", generator=generator)
            return drawn.transpose(1, 2) if transposed else drawn

        self.query, self.grad = (draw(heads[0], num_queries, d).to(dtype) for d in (head_dim, value_dim))
        self.key, self.value = (draw(heads[1], num_keys, d).to(dtype) for d in (head_dim, value_dim))
        self.grad_lse = draw(heads[0], num_queries).contiguous() if with_lse else None
        self.sinks = torch.randn(heads[0], device="cuda", generator=generator).to(dtype) if with_sinks else None
        self.key_range = key_range(batch_size, num_queries, num_keys) if key_range else None
        if arguments.get("softcap"):
            self.query *= 4
        self.problem = check_problem(self.inputs, **arguments)
        self.seen = visible_mask(self.problem, self.query.device, self.key_range, None).expand(
            batch_size, 1, num_queries, num_keys
        )
        self.output, self.lse, self.expected = self.reference()
        self.yardstick = self.peer()
        if self.key_range is not None:
            hidden = ~self.seen.any(-2)[..., None]  # [B, 1, K, 1]
            self.key, self.value = (t.masked_fill(hidden, torch.nan) for t in (self.key, self.value))
        blind = ~self.seen.any(-1)[..., None]  # [B, 1, Q, 1]
        self.query, self.grad = (t.masked_fill(blind, torch.nan) for t in (self.query, self.grad))

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.query, self.key, self.value, self.key_range, sinks=self.sinks)

    def scores(self, query, key):
        scores = self.problem.scale * query @ key.repeat_interleave(self.problem.group, 1).transpose(-1, -2)
        if self.problem.softcap:
            scores = self.problem.softcap * torch.tanh(scores / self.problem.softcap)
        return scores

    def leaves(self, dtype):
        """Query, key and value, and the sinks where there are any, as autograd wants them."""
        tensors = (self.query, self.key, self.value, self.sinks)
        return [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors if t is not None]

    def weights(self, probabilities):
        """What of these values are multiplied with."""
        return probabilities

    def attended(self, dtype, query, key, value, sinks=None):
        """(output, lse) with scores in `dtype` and the product with value in value's; lse is 0 of rows without a key.

        With sinks no row lacks anything to see.
        """
        scores = self.scores(query.to(dtype), key.to(dtype)).masked_fill(~self.seen, -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            lse = torch.cat((scores, sink), -1).logsumexp(-1)
            probabilities = (scores - lse[..., None]).exp()
        else:
            empty = ~self.seen.any(-1, keepdim=True)
            scores = scores.masked_fill(empty, 0.0)
            lse = scores.logsumexp(-1).masked_fill(empty[..., 0], 0.0)
            probabilities = (scores - lse[..., None]).exp().masked_fill(empty, 0.0)
        probabilities = self.weights(probabilities)
        return probabilities.to(value.dtype) @ value.repeat_interleave(self.problem.group, 1), lse

    def differentiated(self, dtype, leaves, output, lse):
        loss = (output.to(dtype) * self.grad.to(dtype)).sum()
        if self.grad_lse is not None:
            loss = loss + (lse * self.grad_lse.to(dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    def reference(self):
        leaves = self.leaves(torch.float64)
        output, lse = self.attended(torch.float64, *leaves)
        gradients = self.differentiated(torch.float64, leaves, output, lse)
        lse = lse.detach()
        if self.sinks is None:
            lse = lse.masked_fill(~self.seen.any(-1).expand_as(lse), -torch.inf)
        return output.detach().to(self.query.dtype), lse.float(), gradients

    def peer(self):
        """Gradients of the formula in the call's dtype, with scores in fp32, as fused kernels compute it.

        By PyTorch's fused attention where that has what the call asks for.
        """
        leaves = self.leaves(self.query.dtype)
        plain = not self.problem.softcap and not self.problem.dropout
        if plain and self.grad_lse is None and self.sinks is None:
            query, key, value = leaves
            empty = ~self.seen.any(-1, keepdim=True)
            attend = (self.seen | empty).expand(-1, query.shape[1], -1, -1)
            output = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attend, scale=self.problem.scale, enable_gqa=self.problem.group > 1
            ).masked_fill(empty, 0.0)
            return torch.autograd.grad(output, leaves, self.grad)
        return self.differentiated(torch.float32, leaves, *self.attended(torch.float32, *leaves))

    def run(self, problem=None, **changed):
        """The gradients; `changed` are arguments of `run_backward` in place of the call's own."""
        problem, device = problem or self.problem, device_of(self.query.device)
        plan = choose_backward(problem, device)
        assert plan.kernel == "flashcore_hopper_backward", plan.reason
        of = {"inputs": self.inputs, "output": self.output, "lse": self.lse, "grad_output": self.grad}
        of |= {"grad_lse": self.grad_lse, "sinks_grad": self.sinks is not None}
        gradients = launch.run_backward(problem, plan.config, **{**of, **changed})
        return tuple(gradient for gradient in gradients if gradient is not None)

    def sum_of_roundings(self) -> torch.Tensor:
        """`[H]`: the root of the squares that a sink's gradient sums up, share * dO * O of every query and column."""
        share = torch.exp(self.sinks.double()[None, :, None] - self.lse.double())  # [B, H, Q]
        terms = share[..., None] * self.grad.double().nan_to_num() * self.output.double()
        return terms.square().sum((0, 2, 3)).sqrt()

    def wrong(self, gradients) -> list[str]:
        """What breaks the rule."""
        wrong = []
        for name, got, want, peer in zip(GRADIENTS, gradients, self.expected, self.yardstick):
            if not torch.isfinite(got).all():
                wrong.append(f"{name} has {(~torch.isfinite(got)).sum().item()} numbers that are not finite")
                continue
            error, yardstick = (got.double() - want).abs(), (peer.double() - want).abs()
            rounding = 2 * torch.finfo(self.query.dtype).eps / 2
            if name == "dsinks":
                # One number of each head is a sum over all queries that may cancel: what rounding the output to 16 bits
                # alone changes in it, which the peer may have the luck not to show.
                want = torch.maximum(want.abs(), self.sum_of_roundings())
            for kind, of, ratio in (("largest", torch.max, MAX_RATIO), ("RMS", _rms, RMS_RATIO)):
                bound = ratio * of(yardstick) + rounding * of(want.abs())
                if of(error) > bound:
                    wrong.append(f"{kind} error of {name} {of(error):.3g}, at most {bound:.3g}")
        return wrong


def _rms(x):
    return x.pow(2).mean().sqrt()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Gradients are NaN until they are written."""
    original = launch.empty_like_heads
    monkeypatch.setattr(launch, "empty_like_heads", lambda tensor: original(tensor).fill_(torch.nan))


def left_padding(batch_size, num_queries, num_keys):
    first = torch.arange(batch_size, device="cuda") * 37 % (num_keys // 2)
    return make_key_range(batch_size, num_keys, first=first, query_start=num_keys - num_queries, right=0)


def right_padding(batch_size, num_queries, num_keys):
    end = num_keys - torch.arange(batch_size, device="cuda") * 29 % (num_keys // 2)
    return make_key_range(batch_size, num_keys, end=end, query_start=num_keys - num_queries, right=0)


def both_sides(batch_size, num_queries, num_keys):
    start = num_keys - num_queries
    return make_key_range(
        batch_size, num_keys, first=5, end=num_keys - 11, query_start=start, left=100, right=33, device="cuda"
    )


def holes(batch_size, num_queries, num_keys):
    mask = torch.rand(batch_size, num_keys, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) > 0.3
    return make_key_range(batch_size, num_keys, query_start=num_keys - num_queries, right=0, key_mask=mask)


def hole(batch_size, num_queries, num_keys):
    """In the midst of the keys, and wider than the window: queries there see nothing, and are NaN."""
    mask = torch.ones(batch_size, num_keys, dtype=torch.bool, device="cuda")
    mask[:, num_keys // 4 : num_keys // 4 + 70] = False
    return make_key_range(batch_size, num_keys, query_start=num_keys - num_queries, left=20, right=0, key_mask=mask)


def window_before_padding(batch_size, num_queries, num_keys):
    """Queries beyond the last key by more than the window see nothing."""
    end = num_keys - torch.arange(batch_size, device="cuda") * 53 % (num_keys // 2)
    return make_key_range(batch_size, num_keys, end=end, query_start=num_keys - num_queries, left=9, right=0)


def documents(batch_size, num_queries, num_keys):
    """Causal, behind each other, of 1 to 97 tokens; each sequence ends in queries that see nothing."""
    drawn = torch.Generator().manual_seed(batch_size + num_queries)
    first, end = torch.zeros(2, batch_size, num_queries, dtype=torch.int64)
    for b in range(batch_size):
        at = 0
        while at < min(num_queries, num_keys) - 9:
            length = min(int(torch.randint(1, 98, (), generator=drawn)), min(num_queries, num_keys) - at)
            first[b, at : at + length] = at
            end[b, at : at + length] = torch.arange(at, at + length) + 1
            at += length
    return make_row_ranges(first.cuda(), end.cuda(), num_keys)


def prefixes(batch_size, num_queries, num_keys):
    """Each sequence sees a prefix of its own as a whole, and goes on causally."""
    m = torch.arange(num_queries).expand(batch_size, -1)
    prefix = torch.arange(batch_size)[:, None] * 41 % num_keys + 1
    return make_row_ranges(torch.zeros_like(m).cuda(), torch.maximum(m + 1, prefix).cuda(), num_keys)


def islands(batch_size, num_queries, num_keys):
    """Each 50 queries see 30 keys, and nobody sees those between: they are NaN."""
    first = (torch.arange(num_queries) // 50 * 50).expand(batch_size, -1) + torch.arange(batch_size)[:, None]
    return make_row_ranges(first.cuda(), first.cuda() + 30, num_keys)


def arbitrary(batch_size, num_queries, num_keys):
    """Ranges in no order, some of them empty, some beyond the keys."""
    drawn = torch.Generator().manual_seed(num_queries)
    ends = torch.randint(-9, num_keys + 9, (2, batch_size, num_queries), generator=drawn)
    first, end = ends.amin(0), ends.amax(0)
    end = torch.where(torch.arange(num_queries) % 7 == 3, first, end)
    return make_row_ranges(first.cuda(), end.cuda(), num_keys)


FEATURES = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 51},
    "both sides": {"window": (30, 20)},
    "scale": {"is_causal": True, "scale": 0.3},
    "lse": {"is_causal": True, "with_lse": True},
    "softcap": {"is_causal": True, "softcap": 8.0},
    "sinks": {"is_causal": True, "with_sinks": True},
    "transposed": {"is_causal": True, "transposed": True},
    "left padding": {"key_range": left_padding},
    "right padding": {"key_range": right_padding},
    "bounds": {"key_range": both_sides},
    "holes": {"key_range": holes, "with_lse": True},
    "hole": {"key_range": hole},
    "hole and sinks": {"key_range": hole, "with_lse": True, "with_sinks": True},
    "window before padding": {"key_range": window_before_padding},
    "documents": {"key_range": documents},
    "documents and sinks": {"key_range": documents, "with_lse": True, "with_sinks": True},
    "documents and softcap": {"key_range": documents, "softcap": 8.0},
    "prefixes": {"key_range": prefixes, "with_lse": True},
    "islands": {"key_range": islands},
    "arbitrary": {"key_range": arbitrary, "transposed": True},
    "sinks and holes": {"key_range": holes, "with_lse": True, "with_sinks": True},
}
# With 64 queries on 192 keys `prefixes` ends within a block of 128 keys, behind a whole number of 64.
LENGTHS = [(64, 64), (128, 128), (333, 333), (200, 333), (333, 200), (17, 700), (512, 512), (64, 192)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, head_dim):
    for lengths in LENGTHS:
        for heads in ((4, 2), (3, 3), (8, 1)):
            case = Case(3, heads, *lengths, head_dim, **FEATURES[feature])
            assert not case.wrong(case.run()), (lengths, heads)


DIMS = [(8, 8), (40, 40), (72, 72), (96, 96), (120, 64), (64, 128), (192, 128), (136, 40), (160, 160), (40, 200)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_head_dims(dims, dtype):
    case = Case(2, (4, 2), 200, 333, *dims, dtype=dtype, is_causal=True)
    assert not case.wrong(case.run())


def far_islands(batch_size, num_queries, num_keys):
    """Of 2,112: the first 32 keys are seen by as many queries, the next 2,038 by others, the rest by nobody.

    With blocks of 32 keys a tile then begins within 64 keys, and ends 2,048 keys on.
    """
    m = torch.arange(num_queries)
    first = torch.where(m < 32, 0, 32).expand(batch_size, -1)
    end = torch.where(m < 32, 32, torch.where(m < 2070, 2070, 0)).expand(batch_size, -1)
    return make_row_ranges(torch.minimum(first, end).cuda(), end.cuda(), num_keys)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_that_nobody_sees_far_on(head_dim):
    case = Case(1, (2, 1), 2112, 2112, head_dim, key_range=far_islands)
    assert not case.wrong(case.run())


def test_many_tiles():
    """More tiles than programs: these draw several."""
    case = Case(6, (32, 8), 512, 512, 128, is_causal=True)
    assert not case.wrong(case.run())


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed):
    drawn = random.Random(seed)
    head_dim = drawn.choice((64, 128, 56, 104, 256, 192))
    num_kv_heads = drawn.choice((1, 2, 3))
    num_queries = drawn.choice((17, 63, 64, 65, 127, 128, 129, 200, 512))
    num_keys = num_queries + drawn.choice((0, 0, 0, 13, 128, 301))
    features = dict(FEATURES[drawn.choice(list(FEATURES))], transposed=drawn.random() < 0.5)
    heads = (num_kv_heads * drawn.choice((1, 2, 4, 7)), num_kv_heads)
    case = Case(drawn.choice((1, 2, 3)), heads, num_queries, num_keys, head_dim, seed=seed, **features)
    assert not case.wrong(case.run())


def test_a_wrong_range_shows():
    """Negative control: a document that sees one key too many, and one query that sees one too few."""
    case = Case(2, (4, 2), 333, 333, 128, key_range=documents)
    assert not case.wrong(case.run())
    for query, key, by in ((200, 0, -1), (150, 1, -1)):
        changed = case.key_range.clone()
        changed[:, :, query : query + 3, key] += by
        changed[..., 0].clamp_(min=0)
        finite = [t.nan_to_num() for t in (case.query, case.key, case.value)]
        inputs = Inputs(*finite, changed, sinks=case.sinks)
        assert case.wrong(case.run(inputs=inputs, grad_output=case.grad.nan_to_num())), (query, key)


def test_what_is_wrong_shows():
    """Negative control: each of these mistakes breaks the rule."""
    case = Case(2, (4, 2), 333, 333, 128, is_causal=True, window=51, with_lse=True, with_sinks=True)
    assert not case.wrong(case.run())
    for mistake in ({"scale": case.problem.scale * 1.05}, {"left": case.problem.left + 1}, {"right": 1}):
        assert case.wrong(case.run(case.problem._replace(**mistake))), mistake
    assert case.wrong(case.run(grad_lse=None))
    gradients = case.run()
    for left_out in (1, 3):  # as if a head of the group were, and half of the batch
        assert case.wrong([g * 0.5 if i == left_out else g for i, g in enumerate(gradients)])


@pytest.mark.parametrize("name", ["grad", "query", "key", "value", "output"])
def test_layouts_that_the_copy_engine_cannot_read(name):
    """Tensors may be transposed, or begin between two multiples of 16 bytes: the bits are those of any other layout."""
    case = Case(2, (4, 2), 200, 333, 64, is_causal=True)
    want, tensor = case.run(), getattr(case, name)
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
    setattr(case, name, memory.view(tensor.shape).copy_(tensor))
    assert all(map(torch.equal, want, case.run()))
    setattr(case, name, tensor.transpose(2, 3).contiguous().transpose(2, 3))
    assert all(map(torch.equal, want, case.run()))


def test_an_expanded_gradient():
    """What `output.sum().backward()` passes on."""
    case = Case(2, (4, 2), 200, 333, 64, is_causal=True)
    ones = torch.ones((), dtype=torch.bfloat16, device="cuda").expand_as(case.grad)
    assert all(map(torch.equal, case.run(grad_output=ones), case.run(grad_output=ones.contiguous())))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_two_runs_give_the_same_bits(head_dim):
    case = Case(4, (16, 4), 777, 777, head_dim, is_causal=True)
    first = case.run()
    for _ in range(200):
        assert all(map(torch.equal, first, case.run()))


@pytest.mark.parametrize("padding", [1, 64, 77, 128, 200])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_padded_and_alone_give_the_same_bits(head_dim, padding):
    """And a sequence of another length in the batch changes none either."""

    def padded(batch_size, num_queries, num_keys):
        return make_key_range(batch_size, num_keys, first=torch.tensor([padding, 0], device="cuda"), right=0)

    both = Case(2, (8, 2), 400, 400, head_dim, key_range=padded)
    together = both.run()
    alone = Case(1, (8, 2), 400 - padding, 400 - padding, head_dim, is_causal=True)
    for name in ("query", "key", "value", "grad", "output", "lse"):
        setattr(alone, name, getattr(both, name)[:1, :, padding:].contiguous())
    for name, one, other in zip(GRADIENTS, together, alone.run()):
        assert torch.equal(one[:1, :, padding:], other), name
        assert not one[:1, :, :padding].any(), name
