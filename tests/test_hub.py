"""Folders as Hugging Face writes and reads them: ids, dtypes, memory, old layouts, the hub."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skylar.data.chat import CHATML
from skylar.data.tokenizer import BPETokenizer
from skylar.layers.rope import RotaryEmbedding
from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.families.skylar import SkylarConfig
from skylar.models.hub import (
    eos_token_ids,
    from_pretrained,
    load_tokenizer,
    push_to_hub,
    save_pretrained,
)
from skylar.models.presets import config_from_hf, config_to_hf, needs_skylar

SIZES = dict(vocab_size=300, d_model=16, n_heads=2, n_layers=2, d_ff=24, max_seq_len=32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["Ciao, come va? " * 50], vocab_size=277)


def model(config=None):
    torch.manual_seed(0)
    return CausalLM(config or Llama3Config(**SIZES, n_kv_heads=1))


def equal(a, b) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items())
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


# --- what is written --------------------------------------------------------------------


@pytest.mark.parametrize("config, model_type", [
    (GPT2Config(**SIZES), "gpt2"),
    (GPT2Config(**SIZES, tie_embeddings=False, dropout=0.1), "gpt2"),
    (GPT2Config(**SIZES, bias=False), "skylar"),
    (GPT2Config(**SIZES, d_head=6), "skylar"),
    (Llama3Config(**SIZES, n_kv_heads=1, bias=True, dropout=0.1), "llama"),
    (Llama3Config(**SIZES | dict(d_model=15), n_kv_heads=1, d_head=6), "skylar"),
    (Qwen3Config(**SIZES | dict(d_model=15), n_kv_heads=1, d_head=6, rope_scaling=YARN), "qwen3"),
    (SkylarConfig(**SIZES, n_kv_heads=1, window=4, num_sink_tokens=1, full_every=2), "skylar"),
])
def test_config_comes_back(tmp_path, config, model_type):
    built = model(config)
    save_pretrained(built, tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["model_type"] == model_type
    back = from_pretrained(tmp_path / "m")
    assert back.decoder_config == config.decoder() and type(back.config) is type(config)
    assert needs_skylar(config) == (model_type == "skylar")
    assert equal(built, back) and not back.training
    ids = torch.randint(300, (1, 12))
    assert torch.equal(built.eval()(ids), back(ids))


def test_rope_for_transformers_5_and_4():
    config = config_to_hf(Llama3Config(**SIZES, n_kv_heads=1, rope_theta=1e4, rope_scaling=YARN))
    assert config["rope_theta"] == 1e4 and YARN.items() <= config["rope_scaling"].items()
    assert config["rope_parameters"] == config["rope_scaling"] | {"rope_theta": 1e4}


@pytest.mark.parametrize("bad, message", [
    ({"type": "RMSNormConfig"}, "type='RMSNormConfig' describes no model"),
    ({"type": "Qwen3Config", "d_modl": 3}, "Qwen3Config has no field 'd_modl'; did you mean"),
    ({"type": "Qwen3Config", "d_model": [3]}, "d_model=.3,. is a tuple; d_model must be int"),
    (None, "type=None is no config; choose from"),
    ({"type": ["a"]}, "type=.'a'. is no config"),
    ({"type": "DecoderConfig", "vocab_size": 3}, "DecoderConfig: .*missing"),
    ({"type": "DecoderConfig", "vocab_size": 3, "d_model": 4, "max_seq_len": 5, "blocks": [3]},
     "blocks=.3,. is a tuple; blocks must be tuple"),
])
def test_a_skylar_config_that_is_none(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf({"model_type": "skylar", "model": bad})
    assert "\n" not in str(error.value)


def test_a_decoder_made_by_hand_with_mixed_blocks(tmp_path):
    transformers = pytest.importorskip("transformers")
    from skylar.models import auto  # noqa: F401

    parts = [GPT2Config(**SIZES), SkylarConfig(**SIZES, n_kv_heads=1, window=4, full_every=0),
             Llama3Config(**SIZES, n_kv_heads=1, rope_scaling=YARN)]
    blocks = tuple(part.decoder().blocks[0] for part in parts)
    config = replace(parts[1].decoder(), blocks=blocks)
    built = model(config).eval()
    back = from_pretrained(save_pretrained(built, tmp_path / "m"))
    assert back.config == config == back.decoder_config and equal(built, back)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.randint(300, (1, 12))
    torch.testing.assert_close(theirs(ids).logits, built(ids))
    theirs.save_pretrained(tmp_path / "theirs")
    assert from_pretrained(tmp_path / "theirs").config == config


@pytest.mark.parametrize("scaling, length, context", [
    ({"rope_type": "linear", "factor": 4.0}, 16, 64),
    ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}, 16, 64),
    ({"rope_type": "yarn", "factor": 4.0}, 16, 64),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 20, 64),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64, 64),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16}, 64, 64),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
     16, 128),
])
def test_the_context_of_a_stretched_model(scaling, length, context):
    hf = OLD | {"max_position_embeddings": length, "rope_scaling": scaling}
    config = config_from_hf(hf)
    assert config.max_seq_len == context == config.decoder().max_seq_len
    again = config_from_hf(config_to_hf(config))
    assert again == replace(config, n_kv_heads=2, d_head=8)


def test_static_ntk_is_written_as_a_larger_theta():
    ntk = {"rope_type": "ntk", "factor": 4.0}
    config = config_to_hf(Qwen3Config(**SIZES, n_kv_heads=1, d_head=8, rope_scaling=ntk))
    assert config["rope_scaling"] is None and config["rope_theta"] == 1e6 * 4 ** (8 / 6)


def test_tokenizer_ids_and_template(tmp_path, tokenizer):
    save_pretrained(model(), tmp_path / "m", tokenizer)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert tuple(config[f"{role}_token_id"] for role in ("bos", "eos", "pad")) == ids
    ends = {tokenizer.eos_id, *tokenizer.encode("<|im_end|>", allowed_special=True)}
    assert set(eos_token_ids(tmp_path / "m")) == ends
    opened = load_tokenizer(tmp_path / "m")
    assert opened.chat_template == CHATML
    assert BPETokenizer.load(tmp_path / "m").encode("Ciao") == tokenizer.encode("Ciao")
    save_pretrained(model(), tmp_path / "again", opened)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "m" / name).read_text() == (tmp_path / "again" / name).read_text()


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    built = model()
    folder = save_pretrained(torch.compile(built), tmp_path / "m")
    assert equal(built, from_pretrained(folder))


def test_without_a_tokenizer_no_token_ends(tmp_path):
    assert eos_token_ids(save_pretrained(model(), tmp_path / "m")) == []


def test_tokenizer_of_another_model(tmp_path, tokenizer):
    small = model(Llama3Config(**SIZES | dict(vocab_size=100), n_kv_heads=1))
    with pytest.raises(ValueError, match="the tokenizer has 277 tokens, the model 100"):
        save_pretrained(small, tmp_path / "m", tokenizer)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("config", [
    Llama3Config(**SIZES, n_kv_heads=1, tie_embeddings=True), GPT2Config(**SIZES)])
def test_shards(tmp_path, config):
    built, limit = model(config), 12_000
    folder = save_pretrained(built, tmp_path / "m", max_shard_size=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 1
    for file in files:
        tensors = load_file(file)
        assert file.stat().st_mode == (folder / "config.json").stat().st_mode
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in tensors)
        with safe_open(file, "pt") as opened:
            assert opened.metadata().keys() == {"format", "sha256"}
    assert not any("lm_head" in name for name in index["weight_map"]), "tied: stored once"
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in built.parameters())
    assert equal(built, from_pretrained(folder))


# --- what is read -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, dtype):
    built = model(Qwen3Config(**SIZES, n_kv_heads=1, d_head=8)).to(dtype)
    folder = save_pretrained(built, tmp_path / "m")
    back = from_pretrained(folder)
    assert equal(built, back) and {p.dtype for p in back.parameters()} == {dtype}
    assert {p.dtype for p in from_pretrained(folder, torch.float64).parameters()} == {
        torch.float64}
    rotary = [m for m in back.modules() if isinstance(m, RotaryEmbedding)]
    expected = [m for m in model(built.config).modules() if isinstance(m, RotaryEmbedding)]
    for a, b in zip(rotary, expected):
        assert a.inv_freq.dtype == torch.float32
        assert torch.equal(a.inv_freq, b.inv_freq), "computed, not left empty by meta"


def test_config_says_the_dtype_under_its_old_name(tmp_path):
    folder = save_pretrained(model(), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert next(from_pretrained(folder).parameters()).dtype == torch.bfloat16


OLD = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "num_attention_heads": 2,
       "num_hidden_layers": 2, "intermediate_size": 24}


@pytest.mark.parametrize("more, theta, scaling", [
    ({}, 1e4, None),
    ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5,
     {"rope_type": "linear", "factor": 2.0}),
    ({"rope_parameters": {"rope_theta": 7e4, "rope_type": "default"}}, 7e4, None),
    ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 7e4}}, 7e4, None),
    ({"max_position_embeddings": 64, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }}, 1e4, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
])
def test_old_and_new_rope_and_missing_fields(more, theta, scaling):
    config = config_from_hf(OLD | more)
    assert config.rope_theta == theta and config.rope_scaling == scaling
    attention = config.decoder().blocks[0].attention
    assert (attention.n_kv_heads, attention.d_head, config.norm_eps) == (2, 8, 1e-6)
    assert config.tie_embeddings is False


def test_qwen3_without_head_dim_means_128():
    config = config_from_hf(OLD | {"model_type": "qwen3", "num_attention_heads": 32})
    assert config.d_head == 128 and config.n_kv_heads == 32


def test_names_without_their_prefix_and_stored_masks(tmp_path):
    "GPT-2 as it was published: no `transformer.`, and a causal mask in every layer."
    built = model(GPT2Config(**SIZES))
    folder = save_pretrained(built, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert equal(built, from_pretrained(folder))


def test_generation_ends_where_the_checkpoint_says(tmp_path):
    folder = save_pretrained(model(), tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert eos_token_ids(folder) == [7]
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert eos_token_ids(folder) == [7, 8]
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text('{"eos_token_id": 5}')
    assert eos_token_ids(folder) == [5]


# --- memory -----------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from skylar.models.hub import from_pretrained
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
torch.set_num_threads(1)
from_pretrained(sys.argv[2])  # a small one: whatever is imported late is imported now
before = peak()
model = from_pretrained(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
print((peak() - before) * 1024 / size)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_loading_needs_memory_for_the_model_once(tmp_path, family):
    sizes = dict(vocab_size=4000, d_model=1024, n_layers=8, max_seq_len=64)
    config = (GPT2Config(**sizes, n_heads=8) if family == "gpt2" else
              Qwen3Config(**sizes, n_heads=8, n_kv_heads=8, d_head=128, d_ff=2800))
    with torch.device("meta"):
        built = CausalLM(config)
    built.to_empty(device="cpu")
    with torch.no_grad():
        for p in built.parameters():
            p.fill_(0.01)
    built.tie_weights()
    assert sum(p.nbytes for p in built.parameters()) > 390e6
    save_pretrained(built, tmp_path / "big")
    save_pretrained(model(), tmp_path / "small")
    del built
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "big", tmp_path / "small"],
        capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.2, "times the model's size"


# --- the hub ----------------------------------------------------------------------------


def test_a_hub_name_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"no folder some/model here, and the hub does not") as e:
        from_pretrained("some/model")
    assert "\n" not in str(e.value)
    with pytest.raises(OSError, match="no folder some/model"):
        load_tokenizer("some/model")


class Hub(http.server.BaseHTTPRequestHandler):
    "Enough of the hub to be uploaded to: remembers what it was sent."

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.calls.append((self.path, self.headers.get("Authorization")))
        if "denied" in self.path or b"denied" in body and "create" in self.path:
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            return self.answer({"url": f"{self.url}/me/tiny", "id": "me/tiny"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            large = [f["path"].endswith(".safetensors") for f in asked]
            return self.answer({"files": [
                {"path": f["path"], "uploadMode": "lfs" if lfs else "regular",
                 "shouldIgnore": False} for f, lfs in zip(asked, large)]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [
                o | {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                for o in objects]}, kind="application/vnd.git-lfs+json")
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "deletedFile":
                    self.deleted.append(value["path"])
                if line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return self.answer({"commitUrl": f"{self.url}/me/tiny/commit/1",
                                "commitOid": "1", "success": True})
        return self.answer({"error": f"unknown path {self.path}"}, 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.blobs[self.path.removeprefix("/lfs/")] = body
        self.answer({})

    def do_GET(self):
        if "denied" in self.path:
            return self.answer({"error": "Invalid username or password."}, 401)
        if "/tree/" in self.path:  # what the repository held before
            names = ["README.md", "model-00001-of-00002.safetensors",
                     "model.safetensors.index.json"]
            return self.answer([{"type": "file", "path": name, "size": 1, "oid": "0"}
                                for name in names])
        info = {"id": "me/tiny", "sha": "0", "siblings": [], "type": "user", "name": "me"}
        self.answer(info)

    def answer(self, content, status=200, kind="application/json"):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    handler = type("Handler", (Hub,), dict(
        calls=[], created={}, files={}, blobs={}, deleted=[]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}"
        yield handler
        server.shutdown()


def test_push_to_hub(hub, tmp_path, tokenizer):
    built = model()
    address = push_to_hub(built, "me/tiny", tokenizer, endpoint=hub.url, token="hf_test")
    assert address == f"{hub.url}/me/tiny/commit/1"
    private = hub.created.get("private"), hub.created.get("visibility")  # newer hubs: this
    assert private in [(True, None), (None, "private")] and hub.created["name"] == "tiny"
    assert {token for path, token in hub.calls if path.startswith("/api")} == {"Bearer hf_test"}
    assert sorted(hub.deleted) == ["model-00001-of-00002.safetensors",
                                   "model.safetensors.index.json"], "of an older model"
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    assert equal(built, from_pretrained(tmp_path))
    assert load_tokenizer(tmp_path).chat_template == CHATML


def test_push_that_is_refused(hub):
    with pytest.raises(OSError, match="could not push to me/denied: .*401") as e:
        push_to_hub(model(), "me/denied", endpoint=hub.url, token="hf_wrong")
    assert "\n" not in str(e.value) and "hf_wrong" not in str(e.value)
