"""Text from a model: the cached loop against an uncached one and transformers' generate."""

import pytest
import torch
from torch.nn import functional as F

import skylar.inference.generate as decoding
from skylar.data.chat import with_chat
from skylar.data.tokenizer import BPETokenizer
from skylar.inference.generate import generate, sample_tokens, stream
from skylar.models.decoder import CausalLM, gpt2
from skylar.models.presets import qwen3

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


def test_seeded_generator_repeats_the_text_and_leaves_the_global_one_alone(model):
    ids = torch.tensor([[1, 2, 3]])
    state = torch.get_rng_state()
    one, two = (generate(model, ids, 12, generator=torch.Generator().manual_seed(5))
                for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)


def test_a_prompt_that_is_too_long_keeps_its_newest_tokens(model):
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


# --- with a cache, and in batches ---


@pytest.fixture(scope="module", params=["gpt2", "qwen3"])
def either(request, model):
    if request.param == "gpt2":
        return model
    torch.manual_seed(0)
    other = CausalLM(qwen3(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16,
                           n_layers=2, d_ff=48, max_seq_len=24, init_std=0.3))
    return other


def prompts(n, length, seed=2):
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def uncached(model, ids, n, longest=24):
    """The oracle: read everything again for each token."""
    for _ in range(n):
        with torch.no_grad():
            token = model.eval()(ids[:, -longest:])[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("cache", [True, False])
def test_equals_the_uncached_loop(either, cache):
    ids = prompts(3, 5)
    assert torch.equal(generate(either, ids, 19, temperature=0, cache=cache),
                       uncached(either, ids, 19))


def test_every_distribution_equals_the_uncached_one(either):
    ids = torch.cat([prompts(2, 5), torch.zeros(2, 19, dtype=torch.long)], dim=1)
    seen = []
    original = decoding.next_logits

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "next_logits", spy)
        for _ in sample_tokens(either, ids, 5, generator=torch.Generator().manual_seed(0)):
            pass
    with torch.no_grad():
        whole = either.eval()(ids[:, :-1])[:, 4:]
    torch.testing.assert_close(torch.stack(seen, 1), whole, rtol=1e-4, atol=1e-4)


def test_cache_changes_no_sampled_text(either):
    one, two = (generate(either, prompts(3, 5), 15, 0.8, top_p=0.9, repetition_penalty=1.2,
                         generator=torch.Generator().manual_seed(1), cache=c)
                for c in (True, False))
    assert torch.equal(one, two)


@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_equals_the_uncached_loop_and_puts_the_kernels_back(batch):
    torch.manual_seed(0)
    model = CausalLM(qwen3(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16,
                           n_layers=2, d_ff=48, max_seq_len=24, init_std=0.3)).bfloat16()
    before = torch._C._get_mkldnn_enabled()
    ids = prompts(batch, 5)
    out = generate(model, ids, 12, temperature=0)
    with torch.no_grad():  # each pick is within rounding of the uncached best
        scores = model(out[:, :-1])[:, 4:].float()
    chosen = scores.gather(-1, out[:, 5:, None])[..., 0]
    assert (scores.amax(-1) - chosen).max() < 0.05 * scores.abs().max()
    assert torch._C._get_mkldnn_enabled() == before
    with pytest.raises(ValueError):
        generate(model, torch.tensor([[V + 5]]), 2)
    assert torch._C._get_mkldnn_enabled() == before


LENGTHS = (7, 3, 1, 5)


def padded(length=7, fill=0):
    rows, mask = prompts(len(LENGTHS), length), torch.zeros(len(LENGTHS), length).long()
    for row, n in enumerate(LENGTHS):
        mask[row, length - n:] = 1
    return torch.where(mask == 1, rows, fill), mask


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_left_padded_rows_say_what_they_say_alone(either, cache, penalty):
    ids, mask = padded()
    out = generate(either, ids, 12, temperature=0, repetition_penalty=penalty,
                   attention_mask=mask, cache=cache)
    assert torch.equal(out[:, :7], ids)
    for row, n in enumerate(LENGTHS):
        alone = generate(either, ids[row:row + 1, -n:], 12, temperature=0,
                         repetition_penalty=penalty)
        assert torch.equal(out[row, -12:], alone[0, -12:])


def test_what_is_in_the_padding_does_not_matter(either):
    one, two = (generate(either, ids, 12, temperature=0, attention_mask=mask)[:, -12:]
                for ids, mask in (padded(fill=0), padded(fill=9)))
    assert torch.equal(one, two)


def test_left_padded_batch_equals_transformers(model, reference):
    ids, mask = padded()
    theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, 12, temperature=0, attention_mask=mask), theirs)


def test_padding_beyond_the_context(either):
    """Past max_seq_len the padding is what is forgotten first."""
    ids, mask = padded(length=20)
    out = generate(either, ids, 30, temperature=0, attention_mask=mask)
    assert out.shape == (4, 50)
    again = generate(either, ids, 30, temperature=0, attention_mask=mask, cache=False)
    assert torch.equal(out[:, :24], again[:, :24])


@pytest.mark.parametrize("mask, message", [
    ([[1, 1, 0]], "row 0 is not"), ([[1, 0, 1]], "row 0 is not"), ([[0, 0, 0]], "row 0 is not"),
    ([[1, 1]], r"attention_mask is \(1, 2\)")])
def test_wrong_masks_are_refused(model, mask, message):
    with pytest.raises(ValueError, match=message):
        generate(model, torch.tensor([[1, 2, 3]]), 2, attention_mask=torch.tensor(mask))


def test_any_of_several_ends_stops_a_row(model, reference):
    ids = prompts(3, 5)
    free = generate(model, ids, 15, temperature=0)
    ends = [int(free[0, 8]), int(free[1, 10])]
    theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15,
                                do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    assert torch.equal(generate(model, ids, 15, temperature=0, eos_id=ends), theirs)


# --- beyond the context ---


def halves(model, ids, n, longest=24):
    """What `generate` promises: when the context is full, its newer half is read again."""
    first = max(ids.shape[1] - longest, 0)
    for _ in range(n):
        if ids.shape[1] - first > longest:
            first = ids.shape[1] - longest // 2
        ids = uncached(model, ids[:, first:], 1) if first == 0 else torch.cat(
            [ids, uncached(model, ids[:, first:], 1)[:, -1:]], dim=1)
    return ids


@pytest.mark.parametrize("length", [1, 20, 24, 25, 40])
def test_beyond_the_context_half_of_it_is_kept(either, length):
    ids = prompts(2, length)
    assert torch.equal(generate(either, ids, 60, temperature=0), halves(either, ids, 60))


def test_beyond_the_context_without_a_cache_the_window_slides(either):
    ids = prompts(2, 20)
    assert torch.equal(generate(either, ids, 30, temperature=0, cache=False),
                       uncached(either, ids, 30))


def test_a_context_of_one_token():
    one = CausalLM(gpt2(vocab_size=V, d_model=8, n_heads=1, n_layers=1, max_seq_len=1))
    assert generate(one, torch.tensor([[3]]), 5, temperature=0).shape == (1, 6)


# --- streaming ---

TEXT = "Ciao 🙂 naïve e\u0301 \U0001f469\u200d\U0001f680 中文 \ufffd end"


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["to be or not to be, that is the question " * 20], vocab_size=285)


@pytest.fixture
def says(tokenizer, monkeypatch):
    """Make every model say `text` after `prompt`, then <eos>."""
    model = CausalLM(gpt2(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=1, n_layers=1,
                          max_seq_len=600))

    def script(text, prompt="to be"):
        told = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(text),
                tokenizer.eos_id]
        read = []

        def next_logits(model, ids, mask=None, cache=None):
            read.extend(ids[0].tolist())
            cache[0].length += ids.shape[1]  # as if it had been read
            assert read == told[:len(read)]
            return 50.0 * F.one_hot(torch.tensor([told[len(read)]]), tokenizer.vocab_size)

        monkeypatch.setattr(decoding, "next_logits", next_logits)
        return model

    return script


def test_stream_ends_at_eos(tokenizer, says):
    model = says(TEXT)
    assert "".join(stream(model, tokenizer, "to be", 500)) == TEXT


def test_characters_over_several_tokens_arrive_whole(tokenizer, says):
    assert len(tokenizer.encode(TEXT)) > len(TEXT)  # single bytes
    pieces = list(stream(says(TEXT), tokenizer, "to be", 500))
    assert "🙂" in pieces and "中" in pieces and pieces.count("\ufffd") == 1


def test_stream_ends_at_a_stop_string(tokenizer, says):
    model = says(TEXT)
    assert "".join(stream(model, tokenizer, "to be", 500, stop=["中文"])) == TEXT.split("中文")[0]


def test_stream_ends_at_max_new_tokens(tokenizer, says):
    model = says("to be or not")
    assert "".join(stream(model, tokenizer, "to be", 1)) == tokenizer.decode(
        tokenizer.encode("to be or not")[:1])


def test_stream_goes_beyond_the_context(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(gpt2(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=16))
    pieces = list(stream(model, tokenizer, "to be", 60, eos_id=[]))
    assert "".join(pieces)


def test_stream_of_ids_and_with_another_end(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(gpt2(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=64))
    ids = [tokenizer.bos_id, *tokenizer.encode("to be")]
    greedy = dict(temperature=0, eos_id=[])
    text = "".join(stream(model, tokenizer, ids, 20, **greedy))
    assert text == "".join(stream(model, tokenizer, "to be", 20, **greedy))
    assert text == "".join(stream(model, with_chat(tokenizer), "to be", 20, **greedy))
    new = generate(model, torch.tensor([ids]), 20, temperature=0)[0, len(ids):].tolist()
    ended = "".join(stream(model, tokenizer, ids, 20, temperature=0, eos_id=new[4]))
    assert ended == tokenizer.decode(new[:new.index(new[4])])


def test_stream_of_a_chat_ends_with_the_answer(tokenizer, monkeypatch):
    chatty = with_chat(tokenizer)
    ids = chatty.chat([{"role": "user", "content": "to be?"}])
    answer = [*tokenizer.encode("or not"), *tokenizer.encode("<|im_end|>\n", True)]
    said = iter(answer)
    model = CausalLM(gpt2(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=1, n_layers=1,
                          max_seq_len=99))
    monkeypatch.setattr(decoding, "next_logits", lambda *_: 50.0 * F.one_hot(
        torch.tensor([next(said)]), tokenizer.vocab_size))
    assert "".join(stream(model, chatty, ids, 50, temperature=0)) == "or not"


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
