"""Text from logits: every processor against transformers', greedy against GPT-2's own generate."""

import pytest
import torch
from torch.nn import functional as F

from skylar.data.tokenizer import BPETokenizer
from skylar.inference.generate import (
    adjust_logits,
    generate,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    pick_token,
    stop_stream,
    stream,
)
from skylar.models.decoder import CausalLM, gpt2

transformers = pytest.importorskip("transformers")

V = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CausalLM(gpt2(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=24))
    with torch.no_grad():  # far from uniform, as a trained model is
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(8)
    return model


@pytest.fixture(scope="module")
def reference(model):
    """transformers' GPT-2 with our weights."""
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=32, n_head=4, n_layer=2, n_positions=24, n_inner=128,
        activation_function="gelu_new", bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        copy(model.model, theirs.transformer)
    ids = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids))
    return theirs


def copy(ours, theirs):
    theirs.wte.weight.copy_(ours.embed_tokens.weight)
    theirs.wpe.weight.copy_(dict(ours.embed_positions.named_parameters()).popitem()[1])
    linear(theirs.ln_f, ours.norm)
    for block, h in zip(ours.layers, theirs.h):
        linear(h.ln_1, block.input_layernorm)
        linear(h.ln_2, block.post_attention_layernorm)
        parts = [getattr(block.self_attn, f"{n}_proj") for n in "qkv"]
        h.attn.c_attn.weight.copy_(torch.cat([p.weight for p in parts]).T)
        h.attn.c_attn.bias.copy_(torch.cat([p.bias for p in parts]))
        for mine, other in ((block.self_attn.o_proj, h.attn.c_proj),
                            (block.mlp.up_proj, h.mlp.c_fc), (block.mlp.down_proj, h.mlp.c_proj)):
            linear(other, mine, transpose=True)


def linear(theirs, ours, transpose=False):
    theirs.weight.copy_(ours.weight.T if transpose else ours.weight)
    theirs.bias.copy_(ours.bias)


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


def test_greedy_equals_transformers(model, reference):
    ids = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(2))
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15,
                                do_sample=False)
    assert torch.equal(generate(model, ids, 15, temperature=0), theirs)


def test_greedy_with_penalty_equals_transformers(model, reference):
    ids = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(2))
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15,
                                do_sample=False, repetition_penalty=1.4)
    assert torch.equal(generate(model, ids, 15, temperature=0, repetition_penalty=1.4), theirs)


def test_a_finished_row_is_filled_with_eos_while_others_go_on(model, reference):
    ids = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(2))
    free = generate(model, ids, 15, temperature=0)
    eos = int(free[0, 8])
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15,
                                do_sample=False, eos_token_id=eos, pad_token_id=eos)
    ours = generate(model, ids, 15, temperature=0, eos_id=eos)
    assert torch.equal(ours, theirs)
    assert (ours[0, 8:] == eos).all()


def test_stops_early_when_all_rows_are_done(model):
    ids = torch.tensor([[1, 2, 3]])
    first = int(generate(model, ids, 1, temperature=0)[0, -1])
    assert generate(model, ids, 20, temperature=0, eos_id=first).shape == (1, 4)


def test_samples_follow_the_distribution(model):
    """Chi-square of 20,000 draws against the softmax: a wrong temperature fails it."""
    ids = torch.tensor([[1, 2, 3]])
    n, g = 20_000, torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits = model.eval()(ids)[:, -1]
    draws = pick_token((logits / 0.7).expand(n, -1), 0.7, g)

    def chi_square(temperature):
        expected = (logits / temperature).softmax(-1)[0] * n
        big = expected >= 5
        counts = draws.bincount(minlength=V)[big]
        return float(((counts - expected[big]) ** 2 / expected[big]).sum()), int(big.sum()) - 1

    value, freedom = chi_square(0.7)
    limit = freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 standard deviations
    assert value < limit < chi_square(0.8)[0]


def test_seeded_generator_repeats_the_text_and_leaves_the_global_one_alone(model):
    ids = torch.tensor([[1, 2, 3]])
    state = torch.get_rng_state()
    one, two = (generate(model, ids, 12, generator=torch.Generator().manual_seed(5))
                for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)


def test_only_the_last_max_seq_len_tokens_are_looked_at(model):
    long = torch.randint(V, (1, 40), generator=torch.Generator().manual_seed(6))
    ours = generate(model, long, 3, temperature=0)
    cropped = generate(model, long[:, -24:], 3, temperature=0)
    assert ours.shape == (1, 43) and torch.equal(ours[:, -3:], cropped[:, -3:])


def test_mode_is_put_back_and_dropout_is_off():
    torch.manual_seed(0)
    model = CausalLM(gpt2(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=24,
                          dropout=0.5)).train()
    ids = torch.tensor([[1, 2, 3]])
    one, two = (generate(model, ids, 9, temperature=0) for _ in range(2))
    assert torch.equal(one, two)
    assert model.training


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=float("nan")),
                                 dict(top_p=0.0), dict(top_p=1.1), dict(top_k=0),
                                 dict(repetition_penalty=0.0), dict(max_new_tokens=-1)])
def test_impossible_settings_are_named(model, bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        generate(model, torch.tensor([[1]]), **{"max_new_tokens": 2, **bad})


@pytest.mark.parametrize("shape", [(1, 0), (3,)])
def test_empty_prompt_is_refused(model, shape):
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, torch.zeros(shape, dtype=torch.long), 2)


def test_zero_new_tokens(model):
    assert generate(model, torch.tensor([[1, 2]]), 0).tolist() == [[1, 2]]


# --- streaming ---

TEXT = "Ciao 🙂 naïve e\u0301 \U0001f469\u200d\U0001f680 中文 \ufffd end"


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["to be or not to be, that is the question " * 20], vocab_size=285)


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


class Scripted:
    """A model that says what it is told, then <eos>."""

    def __init__(self, tokenizer, text, prompt):
        self.ids = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(text),
                    tokenizer.eos_id]
        self.vocab, self.training, self.weight = tokenizer.vocab_size, False, torch.zeros(1)
        self.config = type("Config", (), {"max_seq_len": 10_000})
        self.model = lambda ids: 50.0 * F.one_hot(torch.tensor([[self.next(ids)]]), self.vocab)
        self.lm_head = lambda hidden: hidden

    def next(self, ids):
        assert ids[0].tolist() == self.ids[:ids.shape[1]]
        return self.ids[ids.shape[1]]

    def parameters(self):
        return iter([self.weight])

    def eval(self):
        return self

    def train(self, mode):
        return self


def test_stream_ends_at_eos(tokenizer):
    model = Scripted(tokenizer, TEXT, "to be")
    assert "".join(stream(model, tokenizer, "to be", 500)) == TEXT


def test_characters_over_several_tokens_arrive_whole(tokenizer):
    assert len(tokenizer.encode(TEXT)) > len(TEXT)  # single bytes
    pieces = list(stream(Scripted(tokenizer, TEXT, "to be"), tokenizer, "to be", 500))
    assert "🙂" in pieces and "中" in pieces and pieces.count("\ufffd") == 1


def test_stream_ends_at_a_stop_string(tokenizer):
    model = Scripted(tokenizer, TEXT, "to be")
    assert "".join(stream(model, tokenizer, "to be", 500, stop=["中文"])) == TEXT.split("中文")[0]


def test_stream_ends_at_max_new_tokens(tokenizer):
    model = Scripted(tokenizer, "to be or not", "to be")
    assert "".join(stream(model, tokenizer, "to be", 1)) == tokenizer.decode(
        tokenizer.encode("to be or not")[:1])


def test_stream_equals_generate(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(gpt2(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=64))
    text = "".join(stream(model, tokenizer, "to be", 20, top_k=30,
                          generator=torch.Generator().manual_seed(7)))
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("to be")]])
    out = generate(model, ids, 20, top_k=30, eos_id=tokenizer.eos_id,
                   generator=torch.Generator().manual_seed(7))
    new = out[0, ids.shape[1]:].tolist()
    if tokenizer.eos_id in new:
        new = new[:new.index(tokenizer.eos_id)]
    assert text == tokenizer.decode(new)


@pytest.mark.parametrize("bad, message", [(dict(prompt=""), "empty prompt"),
                                          (dict(stop="x"), "stop='x'"),
                                          (dict(stop=[""]), "stop="),
                                          (dict(top_k=0), "top_k=0")])
def test_stream_refuses_at_the_call(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        stream(None, tokenizer, **{"prompt": "a", "max_new_tokens": 3, **bad})
