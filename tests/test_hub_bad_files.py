"""Damaged, foreign and hostile model folders: one clear error each, and nothing half-done."""

import json
import pickle
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from skylar.data.tokenizer import BPETokenizer
from skylar.models import hub
from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.llama3 import Llama3Config
from skylar.models.hub import eos_token_ids, from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import config_from_hf, config_to_hf

SIZES = dict(vocab_size=40, d_model=16, n_heads=2, n_layers=2, d_ff=24, max_seq_len=32)


def model():
    torch.manual_seed(0)
    return CausalLM(Llama3Config(**SIZES, n_kv_heads=1, tie_embeddings=False))


@pytest.fixture
def folder(tmp_path):
    "A good model in one file."
    return save_pretrained(model(), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    "A good model in several files."
    return save_pretrained(model(), tmp_path / "sharded", max_shard_size=4000)


def refused(folder, match, kind=ValueError):
    with pytest.raises(kind, match=match) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value), "one line"


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# --- damaged ----------------------------------------------------------------------------


def test_good_folders_open(folder, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pairs = zip(from_pretrained(folder).parameters(), from_pretrained(sharded).parameters())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors is damaged or no safetensors file")


def test_truncated_shard_and_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(sharded, f"{shard.name} is damaged")
    shard.unlink()
    refused(sharded, f"{shard.name} is missing", FileNotFoundError)


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b"{", b"\xff\xfe"])
def test_a_header_that_is_none(folder, header):
    data = struct.pack("<Q", len(header)) + header
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "damaged or no safetensors")


def test_a_giant_header_is_refused_without_reading_it(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(folder, "damaged or no safetensors")


def test_header_fuzz(folder):
    "A few wrong bytes in the header: the model opens, or one line says why not."
    file, rng = folder / "model.safetensors", random.Random(0)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(header)] = rng.choice(b'0123456789"[]{},:-F' + bytes([0, 255]))
        file.write_bytes(data)
        try:
            from_pretrained(folder)
        except ValueError as error:
            assert "\n" not in str(error)


def test_wrong_shape(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda t: t.update({name: t[name].T.contiguous()}))
    refused(folder, r"up_proj.weight has shape \(16, 24\), config.json asks for \(24, 16\)")


def test_missing_and_extra_tensors(folder):
    change_weights(folder, lambda t: t.pop("model.norm.weight"))
    refused(folder, "lacks model.norm.weight")
    change_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(16),
                                               "score.weight": torch.ones(2, 16)}))
    refused(folder, "holds score.weight, for which config.json has no place")


def test_many_missing_tensors_are_one_short_line(folder):
    change_weights(folder, lambda t: [t.pop(name) for name in list(t) if "layers" in name])
    refused(folder, "lacks .* and 15 more")


def test_a_bias_that_the_config_does_not_know(folder):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    change_weights(folder, lambda t: t.update(bias))
    refused(folder, "q_proj.bias")


def test_tied_config_with_two_different_matrices(folder):
    change_config(folder, tie_word_embeddings=True)
    refused(folder, "set tie_word_embeddings to false")


def test_tied_config_with_the_same_matrix_twice(folder):
    change_config(folder, tie_word_embeddings=True)
    change_weights(folder, lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened = from_pretrained(folder)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_packed_weights(folder, dtype):
    change_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(16).to(dtype)}))
    refused(folder, "model.norm.weight is stored as (I8|F8_E4M3)")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("offset", [-1, -77, -2000])
def test_a_flipped_bit_in_the_weights(folder, sharded, offset):
    flip(folder / "model.safetensors", offset)
    refused(folder, "model.safetensors is damaged: its weights have changed")
    shard = sorted(sharded.glob("model-*"))[1]
    flip(shard, max(offset, -100))
    refused(sharded, f"{shard.name} is damaged: its weights have changed")


def test_weights_that_another_tool_has_written_carry_no_checksum(folder):
    change_weights(folder, lambda t: t.update({"model.norm.weight": torch.full((16,), 2.0)}))
    assert from_pretrained(folder).model.norm.weight[0] == 2.0


def test_a_damaged_config_and_an_edited_one(folder):
    path = folder / "config.json"
    edited = path.read_text().replace('"rope_theta": 500000.0', '"rope_theta": 10000.0')
    path.write_text(path.read_text().replace('"rope_theta": 500000.0', '"rope_theta": 500001.0'))
    refused(folder, "config.json is damaged.*if you changed it yourself, delete skylar_manifest")
    path.write_text(edited)
    assert from_pretrained(folder).config.rope_theta == 10_000.0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "skylar_manifest.json"])
def test_damaged_tokenizer_files(tmp_path, name):
    tokenizer = BPETokenizer.train(["Ciao, come va? " * 50], vocab_size=277)
    config = Llama3Config(**SIZES | {"vocab_size": 280}, n_kv_heads=1)
    folder = save_pretrained(CausalLM(config), tmp_path / "m", tokenizer)
    load_tokenizer(folder)
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-9], whole[:40] + bytes([whole[40] ^ 2]) + whole[41:], b"", None):
        if damaged is None:
            (folder / name).unlink()
            if name == "skylar_manifest.json":
                continue
        else:
            (folder / name).write_bytes(damaged)
        with pytest.raises((ValueError, FileNotFoundError), match="damaged|missing") as caught:
            load_tokenizer(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json",
                                  "chat_template.jinja", "skylar_manifest.json"])
def test_tokenizer_files_that_link_out_of_the_folder(tmp_path, name):
    tokenizer = BPETokenizer.train(["Ciao, come va? " * 50], vocab_size=277)
    config = Llama3Config(**SIZES | {"vocab_size": 280}, n_kv_heads=1)
    folder = save_pretrained(CausalLM(config), tmp_path / "m", tokenizer)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_tokenizer(folder)


@pytest.mark.parametrize("eos", [{"a": 1}, "2", [1, "2"], True, 2.0])
def test_eos_token_ids_that_are_none(folder, eos):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="eos_token_id=.* are not token ids"):
        eos_token_ids(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_a_config_nested_too_deep(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json is damaged")


# --- foreign ----------------------------------------------------------------------------


def test_weights_of_another_architecture(folder, tmp_path):
    other = save_pretrained(CausalLM(GPT2Config(**SIZES)), tmp_path / "gpt2")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    refused(folder, "lacks lm_head.weight, model.embed_tokens.weight, .* and 18 more")


@pytest.mark.parametrize("changes, match", [
    (dict(model_type="bert"), "model_type='bert' is not one that Skylar builds: gpt2, llama"),
    (dict(model_type=...), "model_type=None"),
    (dict(hidden_act="gelu"), "hidden_act='gelu' has no equal in Skylar, only 'silu'"),
    (dict(mlp_bias=True), "mlp_bias=True"),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type='dynamic'"),
    (dict(rope_scaling={"type": "longrope", "factor": 2.0}), "rope_type='longrope'"),
    (dict(rope_scaling={"rope_type": "linear"}), "rope_type='linear' lacks the field 'factor'"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "odd": 1}), "no field 'odd'"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "not one set for all"),
    (dict(rope_parameters=[1, 2]), "rope_parameters"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(layer_types=["sliding_attention"]), "sliding_attention"),
    (dict(model_type="qwen3", use_sliding_window=True), "use_sliding_window=True"),
    (dict(quantization_config={"quant_method": "gptq"}), "gptq"),
    (dict(hidden_size="16"), "d_model='16' is a str"),
    (dict(hidden_size=...), "config.json asks for .40, 4096."),
    (dict(num_attention_heads=0), "n_heads=0"),
    (dict(num_key_value_heads=3), "n_kv_heads=3"),
    (dict(head_dim=7), "d_head=7"),
    (dict(rms_norm_eps=-1.0), "norm_eps=-1.0"),
    (dict(head_dim=10**12), "d_head=1000000000000 does not fit its weights"),
    (dict(num_hidden_layers=10**12), "n_layers=1000000000000 does not fit its weights"),
    (dict(num_hidden_layers=22), "n_layers=22 does not fit its weights: .* in 21 tensors"),
    (dict(vocab_size=10**30), "vocab_size=1000000000000000000000000000000 does not fit"),
    (dict(hidden_size=2**20, head_dim=8), "config.json asks for"),
])
def test_config_that_we_cannot_build(folder, changes, match):
    change_config(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize("changes, match", [
    (dict(activation_function="relu"), "activation_function='relu'"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    (dict(scale_attn_weights=False), "scale_attn_weights=False"),
    (dict(layer_norm_epsilon=-1.0), "norm_eps=-1.0"),
    (dict(add_cross_attention=True), "add_cross_attention=True"),
    (dict(resid_pdrop=[0.1]), r"dropout=\[0.1\] is a list"),
])
def test_gpt2_config_that_we_cannot_build(tmp_path, changes, match):
    folder = save_pretrained(CausalLM(GPT2Config(**SIZES)), tmp_path / "gpt2")
    change_config(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '"llama"'])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_config_fuzz():
    "Whatever stands in a config.json, reading it ends in a config or a ValueError."
    rng, odd = random.Random(0), [None, True, -1, 0, 2.5, "x", [], [1], {}, {"a": 1}, 10**5]
    for config in (Llama3Config(**SIZES, n_kv_heads=1), GPT2Config(**SIZES)):
        good = config_to_hf(config)
        for _ in range(400):
            bad = good | {k: rng.choice(odd) for k in rng.sample(list(good), rng.randint(1, 3))}
            bad.pop(rng.choice(list(bad)))
            try:
                config_from_hf(bad)
            except ValueError as error:
                assert "\n" not in str(error)


# --- hostile ----------------------------------------------------------------------------


class Bomb:
    "Unpickling it creates a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickle_is_not_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    with open(folder / name, "wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    refused(folder, f"{name} is a pickle, which can run code")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_name_of_safetensors(folder, tmp_path):
    with open(folder / "model.safetensors", "wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    refused(folder, "damaged or no safetensors")
    assert not (tmp_path / "exploded").exists()


def test_code_beside_the_weights_is_not_run(folder, tmp_path):
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    from_pretrained(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("place", ["../other/{}", "{root}/other/{}", "sub/../../other/{}",
                                   "..\\other\\{}", "..", ""])
def test_an_index_that_leads_out_of_the_folder(sharded, tmp_path, place):
    other = save_pretrained(model(), tmp_path / "other")
    place = place.format("model.safetensors", root=tmp_path)
    assert (other / "model.safetensors").exists()
    change_index(sharded, lambda names: names.update({"model.norm.weight": place}))
    refused(sharded, "is not the name of a file in this folder")


@pytest.mark.parametrize("value", [None, 3, ["model.safetensors"]])
def test_an_index_of_nonsense(sharded, value):
    change_index(sharded, lambda names: names.update({"model.norm.weight": value}))
    refused(sharded, "weight_map")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leads_out_of_the_folder(folder, tmp_path, name):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, f"{name} is a link out of its folder")


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    "There every file of snapshots/<revision> is a link into blobs."
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    from_pretrained(snapshot)
    shutil.move(blobs / "0", tmp_path / "elsewhere")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "link out of its folder")


def test_nothing_there(folder, tmp_path):
    refused(tmp_path / "nowhere", "no model folder at", FileNotFoundError)
    refused(folder / "config.json", "no model folder at", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no config.json", FileNotFoundError)
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no model.safetensors", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)


# --- nothing half-written ---------------------------------------------------------------


def test_a_folder_with_something_in_it_is_not_touched(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        save_pretrained(model(), folder)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        save_pretrained(model(), folder / "config.json")
    (tmp_path / "fresh").mkdir()
    save_pretrained(model(), tmp_path / "fresh")  # empty: welcome


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
