"The fused loss against F.cross_entropy: values, gradients, every option, every boundary."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skylar.training.loss import NextTokenObjective, cross_entropy, linear_cross_entropy

OPTIONS = [{}, {"z_loss": 1e-2}, {"softcap": 3.0}, {"z_loss": 1e-2, "softcap": 3.0}]


def plain(hidden, weight, labels, z_loss=0.0, softcap=None, ignore_index=-100):
    "The same loss in the obvious way, all logits at once."
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    valid = labels != ignore_index
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=ignore_index)
    return loss + z_loss * (logits.logsumexp(-1).square() * valid).sum(), valid.sum()


def example(n=13, d=6, v=17, dtype=torch.float64, ignored=(0, 5, 12)):
    torch.manual_seed(0)
    hidden = (2 * torch.randn(n, d)).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,))
    labels[list(ignored)] = -100
    return hidden, weight, labels


def gradients(loss_fn, hidden, weight, labels, upstream=1.0, **options):
    loss, n = loss_fn(hidden, weight, labels, **options)
    return loss.detach(), n, torch.autograd.grad(loss * upstream, (hidden, weight))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_plain_in_value_and_gradient(options, chunk):
    ours = gradients(linear_cross_entropy, *example(), chunk=chunk, **options)
    torch.testing.assert_close(ours, gradients(plain, *example(), **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_plain_in_fp32(options):
    ours = gradients(linear_cross_entropy, *example(dtype=torch.float32), chunk=5, **options)
    torch.testing.assert_close(ours, gradients(plain, *example(dtype=torch.float32), **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    hidden, weight, labels = example(n=5, d=3, v=4, ignored=(1,))

    def f(h, w):
        return linear_cross_entropy(h, w, labels, chunk=2, **options)[0]

    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("upstream", [0.0, 1 / 7, -3.0])
def test_any_upstream_gradient(upstream):
    ours = gradients(linear_cross_entropy, *example(), upstream=upstream, z_loss=1e-2)
    torch.testing.assert_close(ours, gradients(plain, *example(), upstream=upstream, z_loss=1e-2))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_rows_with_an_upstream_gradient_each(options, chunk):
    "Not one for all: Liger scaled every row by the first one's."
    u = torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for options_ in (options | {"chunk": chunk}, options):
        loss_fn = linear_cross_entropy if "chunk" in options_ else cross_entropy
        hidden, weight, labels = example()
        losses, n = loss_fn(hidden, weight, labels, reduction="none", **options_)
        assert losses.shape == labels.shape and (losses[labels == -100] == 0).all()
        assert n == 10 and (losses[labels != -100] > 0).all()
        found.append((losses.detach(),
                      torch.autograd.grad((u * losses).sum(), (hidden, weight))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("loss_fn", [linear_cross_entropy, cross_entropy])
def test_rows_add_up_to_the_sum(loss_fn):
    hidden, weight, labels = example()
    losses, n = loss_fn(hidden, weight, labels, reduction="none", z_loss=1e-2)
    torch.testing.assert_close((losses.sum(), n), loss_fn(hidden, weight, labels, z_loss=1e-2))
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        loss_fn(hidden, weight, labels, reduction="mean")


def test_gradcheck_of_rows():
    hidden, weight, labels = example(n=5, d=3, v=4, ignored=(1,))

    def f(h, w):
        return linear_cross_entropy(
            h, w, labels, chunk=2, reduction="none", z_loss=1e-2, softcap=3.0)[0]

    assert torch.autograd.gradcheck(f, (hidden, weight))


def test_rows_without_targets_and_frozen_weight():
    hidden, weight, labels = example(ignored=range(13))
    losses, n = linear_cross_entropy(hidden, weight, labels, reduction="none")
    grads = torch.autograd.grad(losses.sum(), (hidden, weight))
    assert n == 0 and not losses.any() and not grads[0].any() and not grads[1].any()
    hidden, weight, labels = example()
    losses, _ = linear_cross_entropy(hidden, weight.detach(), labels, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), hidden)
    expected = gradients(plain, hidden, weight, labels)[2][0]
    torch.testing.assert_close(grad, expected)


def test_more_tokens_than_one_tile_of_the_weight():
    "2,048 tokens of the vocabulary at a time, several chunks, and the last of each smaller."
    ours, theirs = (gradients(f, *example(n=70, v=9001), **options)
                    for f, options in ((linear_cross_entropy, {"chunk": 33}), (plain, {})))
    torch.testing.assert_close(ours, theirs)


def test_changing_a_gradient_in_place_never_changes_the_next_one_silently():
    hidden, weight, labels = example()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    expected = [g.clone() for g in torch.autograd.grad(
        loss, (hidden, weight), retain_graph=True)]
    for g in torch.autograd.grad(loss, (hidden, weight), retain_graph=True):
        g.mul_(2)
    try:
        again = torch.autograd.grad(loss, (hidden, weight))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(list(again), expected)


def test_backward_twice_gives_the_same():
    hidden, weight, labels = example()
    loss, n = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss / n, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss / n, (hidden, weight)))


@pytest.mark.parametrize("rows", [13, 0])
def test_nothing_to_predict_is_zero_not_nan(rows):
    hidden, weight, labels = example(n=rows, ignored=range(rows))
    loss, n, grads = gradients(linear_cross_entropy, hidden, weight, labels, z_loss=1e-2)
    assert loss == 0 and n == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert grads[0].shape == hidden.shape and grads[1].shape == weight.shape


def test_another_ignore_index():
    hidden, weight, labels = example(ignored=())
    labels[3] = 0
    ours = gradients(linear_cross_entropy, hidden, weight, labels, ignore_index=0)
    torch.testing.assert_close(ours, gradients(plain, hidden, weight, labels, ignore_index=0))
    assert ours[1] == (labels != 0).sum()


def test_huge_logits_stay_finite():
    hidden, weight, labels = example()
    big = (hidden.detach() * 1e4).requires_grad_()
    ours, theirs = (gradients(f, big, weight, labels) for f in (linear_cross_entropy, plain))
    assert ours[0].isfinite()
    torch.testing.assert_close(ours, theirs)


def test_frozen_weight_and_no_grad():
    hidden, weight, labels = example()
    weight.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels)[0] == loss


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_autocast_is_as_close_to_the_truth_as_pytorch(options):
    torch.manual_seed(0)
    hidden = torch.randn(300, 64, requires_grad=True)
    weight = (torch.randn(999, 64) / 8).requires_grad_()
    labels = torch.randint(999, (300,))
    truth = gradients(plain, hidden, weight, labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(linear_cross_entropy, hidden, weight, labels, chunk=64, **options)
        theirs = gradients(plain, hidden, weight, labels, **options)
    assert ours[0].dtype == torch.float32 and ours[2][0].dtype == ours[2][1].dtype == torch.float32
    error = lambda a, b: (a - b).norm() / b.norm()  # noqa: E731
    assert error(ours[0], truth[0]) < 1e-3
    for our, their, true in zip(ours[2], theirs[2], truth[2]):
        assert error(our, true) < max(1.2 * error(their, true), 5e-3)


class Biggest(torch.utils._python_dispatch.TorchDispatchMode):
    "Remembers the number of elements of the largest tensor that any operation returned."
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen = max(self.seen, out.numel())
        return out


def test_no_tensor_of_all_logits_is_ever_made():
    n, v, chunk = 256, 300, 32
    hidden, weight, labels = example(n=n, v=v, dtype=torch.float32)
    with Biggest() as biggest:
        linear_cross_entropy(hidden, weight, labels, chunk=chunk)[0].backward()
    assert biggest.seen == chunk * v < n * v


class Stub(nn.Module):
    "The two attributes of a CausalLM that the objective relies on."

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.calls = []

    def model(self, input_ids, position_ids=None, document_ids=None):
        self.calls.append((position_ids, document_ids))
        return self.embed(input_ids)


def test_objective_sums_over_targets_and_passes_what_the_batch_has():
    torch.manual_seed(0)
    model, ids = Stub(), torch.randint(11, (2, 5))
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss, n, metrics, *_ = NextTokenObjective(model)({"input_ids": ids, "labels": labels})
    logits = model.lm_head(model.embed(ids))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert n == 8 and metrics == {} and model.calls == [(None, None)]
    packed = {"input_ids": ids, "labels": labels, "position_ids": ids, "document_ids": ids}
    NextTokenObjective(model)(packed)
    assert model.calls[1] == (ids, ids)


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "softcap": 3.0}])
def test_compiles_in_one_graph_to_the_same_numbers(options):
    hidden, weight, labels = example(dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled, hidden, weight, labels, chunk=5, **options)
    torch.testing.assert_close(ours, gradients(plain, hidden, weight, labels, **options))
    u = torch.randn(13, generator=torch.Generator().manual_seed(1))
    losses = compiled(hidden, weight, labels, chunk=5, reduction="none", **options)[0]
    expected = cross_entropy(hidden, weight, labels, reduction="none", **options)[0]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(*(torch.autograd.grad((u * x).sum(), (hidden, weight))
                                 for x in (losses, expected)))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_plain_loss_by_name_is_the_same(options):
    ours = gradients(cross_entropy, *example(), **options)
    torch.testing.assert_close(ours, gradients(plain, *example(), **options))
    torch.manual_seed(0)
    model, ids = Stub(), torch.randint(11, (2, 5))
    batch = {"input_ids": ids, "labels": torch.roll(ids, -1, 1)}
    fused, unfused = (NextTokenObjective(model, name, **options)(batch) for name in
                      ("fused", "plain"))
    torch.testing.assert_close(fused, unfused)
    with pytest.raises(ValueError, match="unknown loss 'chunked'"):
        NextTokenObjective(model, "chunked")


def labelled(ids, labels):
    return {"input_ids": ids, "labels": labels}


def test_labels_that_are_not_shifted_are_noticed():
    ids = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    objective = NextTokenObjective(Stub())
    masked = ids.clone()
    masked[:, :4] = -100  # an answer after a prompt
    for labels in (ids, masked):
        with pytest.raises(ValueError, match="labels equal input_ids .*x\\[:, 1:\\]"):
            objective.check_batch(labelled(ids, labels))
    same = torch.full((2, 6), 7)  # a text of one token: shifted or not, nobody can tell
    nothing = torch.full_like(ids, -100)
    for x, y in ((ids[:, :-1], ids[:, 1:]), (same, same), (ids, nothing)):
        objective.check_batch(labelled(x, y))


@pytest.mark.parametrize(("bad", "line"), [
    (dict(labels=torch.zeros(1, 1)), "no 'input_ids', only labels"),
    (dict(input_ids=torch.zeros(1, 1)), "no 'labels', only input_ids"),
    (labelled(torch.zeros(1, 3), torch.zeros(1, 4)), r"\(1, 3\), labels \(1, 4\): .*one shape"),
])
def test_a_batch_without_what_it_needs_is_named(bad, line):
    with pytest.raises(ValueError, match=line):
        NextTokenObjective(Stub()).check_batch(bad)


@pytest.mark.parametrize("tile", [(1, 7), (5, 64), (256, 97)])
def test_the_numbers_do_not_depend_on_the_tile(tile):
    """A plan for a GPU takes its tiles on a CPU."""
    torch.manual_seed(0)
    labels = torch.randint(0, 97, (40,)).masked_fill(torch.arange(40) % 7 == 0, -100)

    def grads(**options):
        torch.manual_seed(1)
        h = torch.randn(40, 16, dtype=torch.double, requires_grad=True)
        w = torch.randn(97, 16, dtype=torch.double, requires_grad=True)
        loss, _ = linear_cross_entropy(h, w, labels, chunk=16, z_loss=0.1, **options)
        return loss, *torch.autograd.grad(loss, (h, w))

    for a, b in zip(grads(tile=tile), grads()):
        torch.testing.assert_close(a, b)
