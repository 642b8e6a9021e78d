"""Flash attention equals plain attention, forward and backward, at the boundaries."""

import pytest
import torch
import torch.nn.functional as F

from skylar.layers.attention import attention, causal_mask, flash_attention


def inputs(n_queries, n_keys, dtype=torch.double, heads=(2, 3)):
    torch.manual_seed(0)
    shapes = (n_queries, 8), (n_keys, 8), (n_keys, 5)
    return [torch.randn(*heads, *shape, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(f, tensors):
    out = f(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, tensors, direction)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 7, 32, 1000])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 1), (1, 33), (32, 32), (33, 33), (5, 40)])
def test_equals_plain_attention(n_queries, n_keys, block, causal):
    tensors = inputs(n_queries, n_keys)
    mask = causal_mask(n_queries, n_keys) if causal else None
    found = with_gradients(lambda *t: flash_attention(*t, block, causal), tensors)
    torch.testing.assert_close(found, with_gradients(lambda *t: attention(*t, mask), tensors))


def test_shared_keys_get_the_sum_of_the_gradients():
    q, k, v = inputs(9, 9)
    shared = [q, k[:, :1].detach().requires_grad_(), v[:1, :1].detach().requires_grad_()]
    found = with_gradients(lambda *t: flash_attention(*t, 4, True), shared)
    expected = with_gradients(lambda *t: attention(*t, causal_mask(9)), shared)
    torch.testing.assert_close(found, expected)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(20, 20, torch.float32)
    tensors = [(1000 * q).detach().requires_grad_(), k, v]
    found = with_gradients(lambda *t: flash_attention(*t, 8, True), tensors)
    assert all(t.isfinite().all() for t in found)
    expected = attention(*tensors, causal_mask(20))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_exact_as_sdpa():
    tensors = inputs(64, 512, torch.bfloat16)
    exact = attention(*(t.double() for t in tensors))
    ours, theirs = flash_attention(*tensors, 16), F.scaled_dot_product_attention(*tensors)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


def test_a_query_without_keys_is_nan_as_in_plain_attention():
    q, k, v = (t.detach() for t in inputs(5, 3))
    out = flash_attention(q, k, v, 2, causal=True)
    torch.testing.assert_close(out, attention(q, k, v, causal_mask(5, 3)), equal_nan=True)


def test_second_derivatives_are_refused():
    q, k, v = inputs(4, 4)
    loss = flash_attention(q, k, v).square().sum()
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_more_queries_than_keys_are_fine_without_a_causal_mask():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(flash_attention(q, k, k, 2), attention(q, k, k))
