"""Shaping and drawing: every processor against transformers', draws by chi-square."""

import pytest
import torch

from skylar.inference.sampling import (
    MIN_TEMPERATURE,
    adjust_logits,
    apply_repetition_penalty,
    check_sampling,
    inference_mode,
    pick_token,
    stop_stream,
    top_k_filter,
    top_p_filter,
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
    assert torch.equal(top_k_filter(logits, k), theirs)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p(logits, ids, p):
    theirs = transformers.TopPLogitsWarper(p)(ids, logits)
    assert torch.equal(top_p_filter(logits, p), theirs)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 5.0])
def test_repetition_penalty(logits, ids, penalty):
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(apply_repetition_penalty(logits, ids, penalty), theirs)


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
    assert top_k_filter(tied, 1).isfinite().tolist() == [[False, True, True, False]]


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
                                 dict(temperature=float("inf")), dict(top_p=0.0),
                                 dict(top_p=1.1), dict(top_p=float("nan")), dict(top_k=0),
                                 dict(top_k=2.5), dict(top_k=True),
                                 dict(repetition_penalty=0.0), dict(repetition_penalty=1e-40),
                                 dict(repetition_penalty=float("inf")),
                                 dict(repetition_penalty=float("nan"))])
def test_impossible_settings_are_named(bad):
    (name, value), = bad.items()
    good = dict(temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        check_sampling(**{**good, **bad})


@pytest.mark.parametrize("temperature", [9e-7, 1e-30, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("filters", [{}, dict(top_k=1), dict(top_p=0.5), dict(top_k=9, top_p=0.9)])
def test_a_tiny_temperature_is_greedy(logits, ids, temperature, filters):
    shaped = adjust_logits(1e4 * logits, ids, temperature, **filters)
    assert torch.equal(pick_token(shaped, temperature), logits.argmax(-1))


def test_the_smallest_temperature_that_divides_stays_finite(logits, ids):
    shaped = adjust_logits(1e6 * logits, ids, MIN_TEMPERATURE, top_p=0.9, repetition_penalty=1e3)
    picked = pick_token(shaped, MIN_TEMPERATURE, torch.Generator().manual_seed(0))
    penalized = adjust_logits(1e6 * logits, ids, 0, repetition_penalty=1e3)
    assert torch.equal(picked, penalized.argmax(-1))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back_even_after_an_error(training):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(training)
    with pytest.raises(KeyError), inference_mode(model):
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
