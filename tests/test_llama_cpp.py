"""llama.cpp itself opens what `save_gguf` writes: the same ids, probabilities and greedy text.

Needs xllamacpp (a prebuilt llama.cpp) in this interpreter, or in the one that the variable
LLAMA_CPP_PYTHON names; llama.cpp runs in a process of its own.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from skylar.data.chat import with_chat
from skylar.data.tokenizer import PATTERNS, BPETokenizer
from skylar.models.decoder import CausalLM
from skylar.models.gguf import convert_to_gguf, interleave_heads, save_gguf
from skylar.models.hub import save_pretrained
from skylar.models.presets import get_config

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:the texts hold only")
PYTHON = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
WORKER = """
import json, sys, urllib.request
import xllamacpp as llama

job = json.load(sys.stdin)
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers = job["file"], 128, 0
params.warmup, params.n_parallel, params.verbosity = False, 1, 0
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
server = llama.Server(params)
answers = []
for path, body in job["calls"]:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(),
        {"content-type": "application/json"})
    answers.append(json.load(urllib.request.urlopen(request)))
print("ANSWERS" + json.dumps(answers), flush=True)
"""


def _has_llama_cpp() -> bool:
    return subprocess.run([PYTHON, "-c", "import xllamacpp"], capture_output=True).returncode == 0


needs_llama_cpp = pytest.mark.skipif(
    not _has_llama_cpp(), reason="needs llama.cpp: pip install xllamacpp, or LLAMA_CPP_PYTHON")


def ask(file, *calls) -> list:
    "Answers of llama.cpp's server to (path, body) pairs."
    done = subprocess.run(
        [PYTHON, "-c", WORKER], input=json.dumps({"file": str(file), "calls": calls}),
        capture_output=True, text=True, timeout=120)
    lines = [x for x in done.stdout.splitlines() if x.startswith("ANSWERS")]
    assert lines, done.stderr[-2000:]
    return json.loads(lines[0].removeprefix("ANSWERS"))


TEXT = ("It's the Question: to be or NOT to be?\n\n  Whether 'tis 12345 nobler,"
        "\tnaïve 日本語 café!\n") * 9
SAMPLES = [
    TEXT, "to be", " to be ", "", "x\n\n\ny", "a  b   c\r\n", "3.14159 ٣٤٥ ½ Ⅷ 1234567890", "<eos>",
    "👩‍👩‍👧‍👦 🇮🇹 e\u0301\u0323 हिन्दी العربية ไทย",
    "we'LL IT'S don't o'clock", "?!/\n/x --> {}[]\n}",
    "\x1c\x85\u2028\u3000\ufeff\U0010ffff", "CamelCaseHTTPServer", "<|im_end|> <think>",
]  # fmt: skip


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request) -> BPETokenizer:
    return BPETokenizer.train([TEXT * 3], 330, pattern=request.param)


SIZES = dict(d_model=64, n_layers=3, n_heads=4, d_head=16, d_ff=96, max_seq_len=64, init_std=0.2)
LLAMA = dict(n_kv_heads=2)
STRETCHED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "gpt2": ("gpt2", dict(bias=True)),
    "llama3": ("llama3", LLAMA),
    "llama3, untied": ("llama3", LLAMA | dict(tie_embeddings=False)),
    "llama3, biases": ("llama3", LLAMA | dict(bias=True)),
    "llama3, stretched": ("llama3", LLAMA | dict(rope_theta=500.0, rope_scaling=STRETCHED)),
    "llama3, linear": ("llama3", LLAMA | dict(rope_scaling={"rope_type": "linear", "factor": 2.0})),
    "llama3, wide heads": ("llama3", LLAMA | dict(d_head=32)),
    "qwen3": ("qwen3", LLAMA),
    "qwen3, wide heads": ("qwen3", LLAMA | dict(d_head=32)),
}


def make(name: str, vocab_size: int, **sizes) -> CausalLM:
    torch.manual_seed(0)
    family, more = MODELS[name]
    args = SIZES | more | sizes
    model = CausalLM(get_config("test", family, vocab_size=vocab_size, **args)).eval()
    for parameter in model.parameters():  # biases and norms that are seen if they are lost
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def continued(model, ids: list[int], n: int) -> tuple[list[int], list[float]]:
    "The greedy continuation, and the log-probability of each of its tokens."
    new, chances = [], []
    for _ in range(n):
        logits = model(torch.tensor([[*ids, *new]]))
        logits = getattr(logits, "logits", logits)[0, -1].float()
        new.append(int(logits.argmax()))
        chances.append(float(logits.log_softmax(-1)[new[-1]]))
    return new, chances


def assert_same_greedy(file, model, ids: list[int], n: int = 12, tolerance: float = 2e-2):
    body = {"prompt": ids, "n_predict": n, "temperature": 0, "n_probs": 1, "ignore_eos": False,
            "cache_prompt": False, "return_tokens": True}
    (answer,) = ask(file, ("/completion", body))
    new, chances = continued(model, ids, n)
    assert answer["tokens"] == new
    shown = answer["completion_probabilities"]  # not of tokens that end in half a character
    found, i = [], -1
    for token in shown:
        i = new.index(token["id"], i + 1)
        found.append((token["logprob"], chances[i]))
    assert found
    assert [theirs for theirs, _ in found] == pytest.approx(
        [ours for _, ours in found], abs=tolerance)


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_and_probabilities_are_ours(name, tmp_path):
    bpe = BPETokenizer.train([TEXT * 3], 330)
    model = make(name, bpe.vocab_size + 6)  # six rows that no token has
    file = save_gguf(model, bpe, tmp_path / "model.gguf")
    assert_same_greedy(file, model, [bpe.bos_id, *bpe.encode("It's the Question: to be")])


@needs_llama_cpp
@pytest.mark.parametrize("dtype, tolerance", [("float16", 3e-2), ("bfloat16", 1e-1)])
def test_half_precision(dtype, tolerance, tmp_path):
    bpe = BPETokenizer.train([TEXT * 3], 330)
    model = make("qwen3", bpe.vocab_size)
    file = save_gguf(model, bpe, tmp_path / "model.gguf", dtype)
    model = model.to(getattr(torch, dtype)).float()
    assert_same_greedy(file, model, [bpe.bos_id, *bpe.encode("to be or")], 8, tolerance)


@needs_llama_cpp
def test_ids_are_ours(tokenizer, tmp_path):
    "Every pattern, on samples and on random text; special tokens as text and as themselves."
    rng = random.Random(0)
    pieces = [*"abcXYZ 's'LL\n\r\t.,!?/019é日😀", "  ", "\n\n", "it's", "<eos>", " the", "\u0301"]
    texts = SAMPLES + ["".join(rng.choices(pieces, k=40)) for _ in range(200)]
    file = save_gguf(make("qwen3", tokenizer.vocab_size), tokenizer, tmp_path / "model.gguf")
    for special in (False, True):
        body = {"add_special": False, "parse_special": special}
        answers = ask(file, *[("/tokenize", body | {"content": text}) for text in texts])
        for text, answer in zip(texts, answers):
            assert answer["tokens"] == tokenizer.encode(text, allowed_special=special), text
    (start,) = ask(file, ("/tokenize", {"content": "to be", "add_special": True}))
    assert start["tokens"] == [tokenizer.bos_id, *tokenizer.encode("to be")]


@needs_llama_cpp
def test_text_and_chat_are_ours(tmp_path):
    bpe = with_chat(BPETokenizer.train([TEXT * 3], 330))
    file = save_gguf(make("llama3", bpe.vocab_size), bpe, tmp_path / "model.gguf")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ciao 😀"}]
    ids = bpe.encode(TEXT)
    text, chat = ask(
        file, ("/detokenize", {"tokens": ids}), ("/apply-template", {"messages": talk}))
    assert text["content"] == TEXT
    assert chat["prompt"].removeprefix("<bos>") == bpe.render(talk).removeprefix("<bos>")


@needs_llama_cpp
def test_arcee_of_transformers(tmp_path):
    "Llama with squared ReLU, converted from their folder."
    transformers = pytest.importorskip("transformers")
    bpe = BPETokenizer.train([TEXT * 3], 330)
    torch.manual_seed(0)
    model = transformers.ArceeForCausalLM(transformers.ArceeConfig(
        vocab_size=bpe.vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        initializer_range=0.2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "hf")
    with_chat(bpe).save(tmp_path / "hf")
    file = convert_to_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    assert_same_greedy(file, model, [bpe.bos_id, *bpe.encode("to be or")])


# Without llama.cpp


@pytest.mark.parametrize("name", ["llama3", "llama3, untied", "qwen3"])
def test_transformers_reads_it_back(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = BPETokenizer.train([TEXT * 3], 330)
    # they take no other head width of Qwen3 than 128 out of a GGUF
    model = make(name, bpe.vocab_size, **(dict(d_head=128) if name == "qwen3" else {}))
    save_gguf(model, bpe, tmp_path / "model.gguf")
    where = dict(pretrained_model_name_or_path=tmp_path, gguf_file="model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where).eval()
    ids = torch.tensor([[bpe.bos_id, *bpe.encode(TEXT)[:40]]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=2e-4)


def test_interleaved_rows_rotate_neighbors():
    "The score of a rotated query and key is the same in both layouts."
    torch.manual_seed(0)
    rows = torch.arange(2 * 8)
    assert interleave_heads(rows, 2).tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert sorted(interleave_heads(rows, 2).tolist()) == rows.tolist()


def test_what_llama_cpp_cannot_run_is_refused_in_one_line(tmp_path):
    bpe = BPETokenizer.train([TEXT], 330)
    own = BPETokenizer.train([TEXT], 330, pattern=r"\w+|\W+")
    model = make("qwen3", 330)
    with pytest.raises(ValueError, match="no name for this tokenizer's pattern"):
        save_gguf(model, own, tmp_path / "a.gguf")
    missing = r"qwen3 has no tensor for model.layers.0.self_attn.\w_proj.bias"
    with pytest.raises(ValueError, match=missing):
        biased = CausalLM(get_config("test", "qwen3", vocab_size=330, **SIZES | dict(bias=True)))
        save_gguf(biased, bpe, tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="gpt2, llama, qwen3, arcee, not for model_type 'skylar'"):
        save_gguf(CausalLM(get_config("test", "skylar", vocab_size=330)), bpe, tmp_path / "a.gguf")
    folder = save_pretrained(model, tmp_path / "m", bpe)
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        convert_to_gguf(folder, tmp_path / "a.gguf", "int4")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(ValueError, match="a.gguf exists"):
        convert_to_gguf(folder, tmp_path / "a.gguf")


def test_a_token_that_merges_do_not_reach_changes_the_name(tmp_path):
    "`llama-bpe` looks whole pieces up first: here that would give another id than ours."
    merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc")]
    from skylar.data.chat import PretrainedTokenizer
    from skylar.models.gguf import pre_tokenizer_name

    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"bc", b"abc"]
    reached = BPETokenizer.from_vocab(dict(enumerate(tokens)), merges[:3])
    tokens[258] = b"bcd"
    merges = [(b"a", b"b"), (b"c", b"d"), (b"b", b"c"), (b"bc", b"d")]
    tokens += [b"cd"]
    missed = BPETokenizer.from_vocab(dict(enumerate(tokens)), merges)
    assert pre_tokenizer_name(PretrainedTokenizer(reached.files)) == "llama-bpe"
    assert pre_tokenizer_name(PretrainedTokenizer(missed.files)) == "dbrx"
