"""What prefill and decode do alike with rows of scores and of sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def end_of_rows(m, l, sink, C: gl.constexpr):
    """(factors, log-sum-exp) of rows whose blocks are all done. Shapes: all are `[rows]`, or what broadcasts to it.

    A row's sum of P V times its factor is its output. The factor is 0 where a row saw no key.

    Args:
        m, l: maxima of the scores in units of log2, sums of probabilities.
        sink: logits that enter the denominators, looked at with `C.sinks` alone.
    """
    if C.sinks:
        sink = sink.to(gl.float32) * LOG2_E
        m_new = gl.maximum(m, sink)
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = gl.exp2(m - m_finite)
        l = l * alpha + gl.exp2(sink - m_finite)
        m = m_new
    else:
        alpha = gl.full_like(m, 1.0)
    # Not l > 0: a NaN in the inputs must stay one.
    empty = l == 0.0
    divisor = gl.where(empty, 1.0, l)
    return alpha / divisor, gl.where(empty, float("-inf"), (m + gl.log2(divisor)) * LN_2)


@gluon.jit
def tanh(x):
    """tanh with a relative error below 4e-6, a hundredth of what 16 bits round by."""
    e = gl.exp2(2.8853900817779268 * x)  # exp(2 x)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=gl.float32, is_pure=True, pack=1
    )
    # 1 - 2 / (1 + e) would cancel near 0: there Taylor's series, up to x^5.
    x2 = x * x
    series = x + x * x2 * (x2 * 0.13333333333333333 - 0.3333333333333333)
    return gl.where(gl.abs(x) < 0.0625, series, 1.0 - 2.0 * inverse)
