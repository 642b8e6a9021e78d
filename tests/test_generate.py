"""Text from a model: the cached loop against an uncached one and transformers' generate."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import skylar.inference.generate as decoding
from skylar.data.chat import with_chat
from skylar.data.tokenizer import BPETokenizer
from skylar.inference.generate import generate, sample_tokens, stream
from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.presets import get_config

transformers = pytest.importorskip("transformers")

V = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CausalLM(GPT2Config(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=24))
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
    ours = generate(model, ids, 15, temperature=0, eos_token_id=eos)
    assert torch.equal(ours, theirs)
    assert (ours[0, 8:] == eos).all()


def test_stops_early_when_all_rows_are_done(model):
    ids = torch.tensor([[1, 2, 3]])
    first = int(generate(model, ids, 1, temperature=0)[0, -1])
    assert generate(model, ids, 20, temperature=0, eos_token_id=first).shape == (1, 4)


def test_seeded_generator_repeats_the_text_and_leaves_the_global_one_alone(model):
    ids = torch.tensor([[1, 2, 3]])
    state = torch.get_rng_state()
    one, two = (generate(model, ids, 12, generator=torch.Generator().manual_seed(5))
                for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:the text is longer")
def test_a_prompt_that_is_too_long_keeps_its_newest_tokens(model):
    long = torch.randint(V, (1, 40), generator=torch.Generator().manual_seed(6))
    ours = generate(model, long, 3, temperature=0)
    cropped = generate(model, long[:, -24:], 3, temperature=0)
    assert ours.shape == (1, 43) and torch.equal(ours[:, -3:], cropped[:, -3:])


def test_mode_is_put_back_and_dropout_is_off():
    torch.manual_seed(0)
    model = CausalLM(GPT2Config(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=24,
                          dropout=0.5)).train()
    ids = torch.tensor([[1, 2, 3]])
    one, two = (generate(model, ids, 9, temperature=0) for _ in range(2))
    assert torch.equal(one, two)
    assert model.training


@pytest.mark.parametrize("bad", [dict(temperature=-0.1), dict(temperature=float("nan")),
                                 dict(top_p=0.0), dict(top_p=1.1), dict(top_k=0),
                                 dict(repetition_penalty=0.0), dict(max_new_tokens=-1),
                                 dict(max_new_tokens=1.5)])
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
    other = CausalLM(Qwen3Config(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16,
                           n_layers=2, d_ff=48, max_seq_len=24, init_std=0.3))
    return other


def prompts(n, length, seed=2):
    return torch.randint(V, (n, length), generator=torch.Generator().manual_seed(seed))


def uncached(model, ids, n, longest=24):
    """The reference: read everything again for each token."""
    for _ in range(n):
        with torch.no_grad():
            token = model.eval()(ids[:, -longest:])[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


WAYS = [dict(fuse=True), dict(fuse=False), dict(cache=False)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_uncached_loop(either, way, batch):
    ids = prompts(batch, 5)
    assert torch.equal(generate(either, ids, 19, temperature=0, **way), uncached(either, ids, 19))


def test_every_distribution_equals_the_uncached_one(either):
    ids = torch.cat([prompts(2, 5), torch.zeros(2, 19, dtype=torch.long)], dim=1)
    seen = []
    original = decoding.next_logits

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "next_logits", spy)
        for _ in sample_tokens(either, ids, 5, generator=torch.Generator().manual_seed(0),
                               fuse=False):
            pass
    with torch.no_grad():
        whole = either.eval()(ids[:, :-1])[:, 4:]
    torch.testing.assert_close(torch.stack(seen, 1), whole, rtol=1e-4, atol=1e-4)


def test_cache_changes_no_sampled_text(either):
    one, two = (generate(either, prompts(3, 5), 15, 0.8, top_p=0.9, repetition_penalty=1.2,
                         generator=torch.Generator().manual_seed(1), **way)
                for way in WAYS[1:])
    assert torch.equal(one, two)


@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_picks_are_within_rounding_of_the_uncached_best(batch, fuse):
    torch.manual_seed(0)
    model = CausalLM(Qwen3Config(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16,
                           n_layers=2, d_ff=48, max_seq_len=24, init_std=0.3)).bfloat16()
    ids = prompts(batch, 5)
    out = generate(model, ids, 18, temperature=0, fuse=fuse)
    with torch.no_grad():
        scores = model(out[:, :-1])[:, 4:].float()
    chosen = scores.gather(-1, out[:, 5:, None])[..., 0]
    assert (scores.amax(-1) - chosen).max() < 0.05 * scores.abs().max()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_processor_flag_is_touched(monkeypatch, fuse, dtype, batch):
    """Flags of oneDNN hold for the whole process: another thread would compute differently."""
    monkeypatch.setattr(torch.backends.mkldnn, "set_flags", lambda *_: pytest.fail("set"))
    model = CausalLM(Qwen3Config(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16,
                           n_layers=2, d_ff=48, max_seq_len=24)).to(dtype)
    generate(model, prompts(batch, 5), 6, fuse=fuse)


@pytest.mark.parametrize("fuse", [True, False])
def test_an_unknown_id_is_named(either, fuse):
    with pytest.raises(ValueError, match=f"token id {V + 5} is outside the vocabulary of {V}"):
        generate(either, torch.tensor([[1, V + 5]]), 2, fuse=fuse)


LENGTHS = (7, 3, 1, 5)


def padded(length=7, fill=0):
    rows, mask = prompts(len(LENGTHS), length), torch.zeros(len(LENGTHS), length).long()
    for row, n in enumerate(LENGTHS):
        mask[row, length - n:] = 1
    return torch.where(mask == 1, rows, fill), mask


@pytest.fixture(scope="module", params=["gpt2", "qwen3", "window", "window and sinks"])
def kind(request, either_kind):
    return either_kind(request.param)


@pytest.fixture(scope="module")
def either_kind(model):
    def make(name):
        if name == "gpt2":
            return model
        torch.manual_seed(0)
        sizes = dict(vocab_size=V, d_model=32, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2,
                     d_ff=48, max_seq_len=24, init_std=0.3)
        if name == "qwen3":
            return CausalLM(Qwen3Config(**sizes))
        sinks = 2 if "sinks" in name else 0
        return CausalLM(get_config("test", "skylar", **sizes, window=4, num_sink_tokens=sinks))

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_left_padded_sequences_continue_as_they_do_alone(kind, way, penalty):
    ids, mask = padded()
    settings = dict(temperature=0, repetition_penalty=penalty, **way)
    out = generate(kind, ids, 12, attention_mask=mask, **settings)
    assert torch.equal(out[:, :7], ids)
    for row, n in enumerate(LENGTHS):
        alone = generate(kind, ids[row:row + 1, -n:], 12, **settings)
        assert torch.equal(out[row, -12:], alone[0, -12:])


def test_what_is_in_the_padding_does_not_matter(either):
    one, two = (generate(either, ids, 12, temperature=0, attention_mask=mask)[:, -12:]
                for ids, mask in (padded(fill=0), padded(fill=9)))
    assert torch.equal(one, two)


def test_left_padded_batch_equals_transformers(model, reference):
    ids, mask = padded()
    theirs = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(model, ids, 12, temperature=0, attention_mask=mask), theirs)


@pytest.mark.filterwarnings("ignore:the text is longer")
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
    assert torch.equal(generate(model, ids, 15, temperature=0, eos_token_id=ends), theirs)


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


@pytest.mark.filterwarnings("ignore:the text is longer")
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("length", [1, 20, 24, 25, 40])
def test_beyond_the_context_half_of_it_is_kept(either, length, fuse):
    ids = prompts(2, length)
    assert torch.equal(generate(either, ids, 60, temperature=0, fuse=fuse),
                       halves(either, ids, 60))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("length, new, warns", [(5, 19, False), (5, 20, False), (5, 21, True),
                                                (24, 1, False), (25, 1, True)])
def test_what_is_forgotten_is_said_once(either, length, new, warns, fuse):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(either, prompts(1, length), new, temperature=0, fuse=fuse)
        generate(either, prompts(1, length), new + 30 * warns, temperature=0, fuse=fuse)
    said = [w for w in caught if "model's context of 24 tokens" in str(w.message)]
    assert len(said) == 2 * warns


@pytest.mark.parametrize("way", WAYS)
def test_stop_at_the_end_of_the_context(either, way):
    ids = prompts(2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = generate(either, ids, 60, temperature=0, context="stop", **way)
    assert out.shape == (2, 25)  # 24 are read; the last is only written
    assert torch.equal(out, uncached(either, ids, 20))
    with pytest.raises(ValueError, match="prompt of 25 tokens is longer than the context of 24"):
        generate(either, prompts(1, 25), 1, context="stop")
    with pytest.raises(ValueError, match="context"):
        generate(either, ids, 1, context="forget")


@pytest.mark.filterwarnings("ignore:the text is longer")
def test_beyond_the_context_without_a_cache_the_window_slides(either):
    ids = prompts(2, 20)
    assert torch.equal(generate(either, ids, 30, temperature=0, cache=False),
                       uncached(either, ids, 30))


@pytest.mark.filterwarnings("ignore:the text is longer")
def test_a_context_of_one_token():
    one = CausalLM(GPT2Config(vocab_size=V, d_model=8, n_heads=1, n_layers=1, max_seq_len=1))
    assert generate(one, torch.tensor([[3]]), 5, temperature=0).shape == (1, 6)


# --- streaming ---

TEXT = "Ciao 🙂 naïve e\u0301 \U0001f469\u200d\U0001f680 中文 \ufffd end"


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["to be or not to be, that is the question " * 20], vocab_size=285)


@pytest.fixture
def says(tokenizer, monkeypatch):
    """Make every model say `text` after `prompt`, then <eos>."""
    model = CausalLM(GPT2Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=1, n_layers=1,
                          max_seq_len=600))

    def script(text, prompt="to be"):
        told = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(text),
                tokenizer.eos_id]
        read = []

        def next_logits(model, ids, mask=None, cache=None):
            read.extend(ids[0].tolist())
            assert read == told[:len(read)]
            return 50.0 * F.one_hot(torch.tensor([told[len(read)]]), tokenizer.vocab_size)

        monkeypatch.setattr(decoding, "next_logits", next_logits)
        return model

    return script


def test_stream_ends_at_eos(tokenizer, says):
    model = says(TEXT)
    assert "".join(stream(model, tokenizer, "to be", 500, fuse=False)) == TEXT


def test_characters_over_several_tokens_arrive_whole(tokenizer, says):
    assert len(tokenizer.encode(TEXT)) > len(TEXT)  # single bytes
    pieces = list(stream(says(TEXT), tokenizer, "to be", 500, fuse=False))
    assert "🙂" in pieces and "中" in pieces and pieces.count("\ufffd") == 1


def test_stream_ends_at_a_stop_string(tokenizer, says):
    model = says(TEXT)
    text = "".join(stream(model, tokenizer, "to be", 500, stop=["中文"], fuse=False))
    assert text == TEXT.split("中文")[0]


def test_stream_ends_at_max_new_tokens(tokenizer, says):
    model = says("to be or not")
    assert "".join(stream(model, tokenizer, "to be", 1, fuse=False)) == tokenizer.decode(
        tokenizer.encode("to be or not")[:1])


@pytest.mark.filterwarnings("ignore:the text is longer")
def test_stream_goes_beyond_the_context(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(GPT2Config(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=16))
    pieces = list(stream(model, tokenizer, "to be", 60, eos_token_id=[]))
    assert "".join(pieces)


def test_stream_of_ids_and_with_another_end(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(GPT2Config(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=64))
    ids = [tokenizer.bos_id, *tokenizer.encode("to be")]
    greedy = dict(temperature=0, eos_token_id=[])
    text = "".join(stream(model, tokenizer, ids, 20, **greedy))
    assert text == "".join(stream(model, tokenizer, "to be", 20, **greedy))
    assert text == "".join(stream(model, with_chat(tokenizer), "to be", 20, **greedy))
    new = generate(model, torch.tensor([ids]), 20, temperature=0)[0, len(ids):].tolist()
    ended = "".join(stream(model, tokenizer, ids, 20, temperature=0, eos_token_id=new[4]))
    assert ended == tokenizer.decode(new[:new.index(new[4])])


def test_stream_of_a_chat_ends_with_the_answer(tokenizer, monkeypatch):
    chatty = with_chat(tokenizer)
    ids = chatty.chat([{"role": "user", "content": "to be?"}])
    answer = [*tokenizer.encode("or not"), *tokenizer.encode("<|im_end|>\n", True)]
    said = iter(answer)
    model = CausalLM(GPT2Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=1, n_layers=1,
                          max_seq_len=99))
    monkeypatch.setattr(decoding, "next_logits", lambda *_: 50.0 * F.one_hot(
        torch.tensor([next(said)]), tokenizer.vocab_size))
    assert "".join(stream(model, chatty, ids, 50, temperature=0, fuse=False)) == "or not"


def test_stream_equals_generate(tokenizer):
    torch.manual_seed(0)
    model = CausalLM(GPT2Config(vocab_size=tokenizer.vocab_size, d_model=32, n_heads=4, n_layers=2,
                          max_seq_len=64))
    text = "".join(stream(model, tokenizer, "to be", 20, top_k=30,
                          generator=torch.Generator().manual_seed(7)))
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("to be")]])
    out = generate(model, ids, 20, top_k=30, eos_token_id=tokenizer.eos_id,
                   generator=torch.Generator().manual_seed(7))
    new = out[0, ids.shape[1]:].tolist()
    if tokenizer.eos_id in new:
        new = new[:new.index(tokenizer.eos_id)]
    assert text == tokenizer.decode(new)


@pytest.mark.parametrize("bad, message", [(dict(prompt=""), "empty prompt"),
                                          (dict(stop="x"), "stop='x'"),
                                          (dict(stop=[""]), "stop="),
                                          (dict(top_k=0), "top_k=0")])
def test_stream_refuses_at_the_call(model, tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        stream(model, tokenizer, **{"prompt": "a", "max_new_tokens": 3, **bad})
