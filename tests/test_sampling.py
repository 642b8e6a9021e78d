"""Shaping and drawing: every processor against transformers', draws by chi-square."""

import pytest
import torch

from skylar.inference.sampling import (
    adjust_logits,
    check_sampling,
    inference,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    pick_token,
    stop_stream,
)

transformers = pytest.importorskip("transformers")

V = 50


@pytest.fixture
def logits():
    return 3 * torch.randn(16, V, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ids():
    return torch.randint(V, (16, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("k", [1, 2, 10, V, V + 7])
def test_top_k(logits, ids, k):
    theirs = transformers.TopKLogitsWarper(k)(ids, logits)
    assert torch.equal(keep_top_k(logits, k), theirs)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits, ids, p):
    theirs = transformers.TopPLogitsWarper(p)(ids, logits)
    assert torch.equal(keep_top_p(logits, p), theirs)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 5.0])
def test_repetition_penalty(logits, ids, penalty):
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalise_repetition(logits, ids, penalty), theirs)


@pytest.mark.parametrize("t", [0.1, 0.7, 1.0, 3.0])
def test_temperature(logits, ids, t):
    assert torch.equal(adjust_logits(logits, ids, t),
                       transformers.TemperatureLogitsWarper(t)(ids, logits))


def test_all_of_them_in_transformers_order(logits, ids):
    chain = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(1.3),
        transformers.TemperatureLogitsWarper(0.8),
        transformers.TopKLogitsWarper(12), transformers.TopPLogitsWarper(0.9)])
    ours = adjust_logits(logits, ids, 0.8, top_k=12, top_p=0.9, repetition_penalty=1.3)
    assert torch.equal(ours, chain(ids, logits))


def test_ties_with_the_kth_stay():
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(tied, 1).isfinite().tolist() == [[False, True, True, False]]


def test_samples_follow_the_distribution():
    """Chi-square of 20,000 draws against the softmax: a wrong temperature fails it."""
    n, g = 20_000, torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, V, generator=torch.Generator().manual_seed(5))
    draws = pick_token((logits / 0.7).expand(n, -1), 0.7, g)

    def chi_square(temperature):
        expected = (logits / temperature).softmax(-1)[0] * n
        big = expected >= 5
        counts = draws.bincount(minlength=V)[big]
        return float(((counts - expected[big]) ** 2 / expected[big]).sum()), int(big.sum()) - 1

    value, freedom = chi_square(0.7)
    limit = freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 standard deviations
    assert value < limit < chi_square(0.8)[0]


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=float("nan")),
                                 dict(top_p=0.0), dict(top_p=1.1), dict(top_k=0),
                                 dict(repetition_penalty=0.0)])
def test_impossible_settings_are_named(bad):
    (name, value), = bad.items()
    good = dict(temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        check_sampling(**{**good, **bad})


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_even_after_an_error(training):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(training)
    with pytest.raises(KeyError), inference(model):
        assert not model[0].training and not torch.is_grad_enabled()
        raise KeyError
    assert model[0].training is training and torch.is_grad_enabled()


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("stop, want", [(["STOP"], "ab S ST STO "), (["zzz"], None), ([], None),
                                        (["ST", "b "], "a"), (["c"], "ab S ST STO STOP ")])
def test_stop_strings_across_pieces(size, stop, want):
    text = "ab S ST STO STOP cd"
    pieces = (text[i:i + size] for i in range(0, len(text), size))
    assert "".join(stop_stream(pieces, stop)) == (text if want is None else want)


def test_text_is_held_back_only_while_it_may_be_a_stop():
    out = list(stop_stream(iter(["a", "S", "x", "S"]), ["ST"]))
    assert out == ["a", "", "Sx", "", "S"]
