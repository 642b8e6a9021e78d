"""Checkpoints in MXFP4 and in fp8 blocks: what transformers makes of them, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from skylar.models import quantized_files
from skylar.models.decoder import CausalLM
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.families.gpt_oss import GptOssConfig
from skylar.models.families.mixtral import MixtralConfig
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.families.qwen3_moe import Qwen3MoEConfig
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.quantized_files import (
    check_quantization,
    decode_fp8_blocks,
    encode_fp8_blocks,
    whole_tensors,
)
from skylar.models.weight_map import state_tensors
from skylar.utils.mxfp4 import decode_mxfp4, encode_mxfp4

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=61, d_model=64, n_heads=4, n_layers=2, max_seq_len=64, init_std=0.3)
HEADS = dict(n_kv_heads=2, d_head=16)
CONFIGS = {
    "gpt_oss": GptOssConfig(**SIZES, **HEADS, d_ff=32, n_experts=4, top_k=2, window=8,
                            rope_scaling=None),
    "deepseek_v3": DeepSeekV3Config(
        **SIZES, d_ff=96, first_dense=1, d_expert=32, n_experts=4, top_k=2, n_groups=2,
        topk_groups=1, q_lora_rank=32, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16, rope_scaling=None),
    "qwen3_moe": Qwen3MoEConfig(**SIZES, **HEADS, d_ff=32, n_experts=4, top_k=2),
    "mixtral": MixtralConfig(**SIZES, **HEADS, d_ff=32, n_experts=4, top_k=2),
    "qwen3": Qwen3Config(**SIZES, **HEADS, d_ff=96),
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
BLOCK = (16, 16)  # transformers reads whole blocks only
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
       "weight_block_size": list(BLOCK), "modules_to_not_convert": ["lm_head"]}


def mxfp4(name: str, tensor: torch.Tensor) -> dict:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    blocks, scales = encode_mxfp4(tensor.mT.contiguous())
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def fp8(name: str, tensor: torch.Tensor) -> dict:
    "All matrices but embeddings, LM head and routers, as in DeepSeek-V3's files."
    if tensor.ndim != 2 or any(part in name for part in ("embed", "lm_head", "gate.weight")):
        return {name: tensor}
    numbers, scales = encode_fp8_blocks(tensor, BLOCK)
    return {name: numbers, f"{name}_scale_inv": scales}


def quantized(folder, config, dtype=torch.float32, shards: bool = False) -> CausalLM:
    "A folder in the format of the published files; returns the model before it was rounded."
    torch.manual_seed(0)
    model = CausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for tensor in state_tensors(model).values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn_like(tensor)
    save_pretrained(model, folder)
    encode, settings = (mxfp4, MXFP4) if config.name == "gpt_oss" else (fp8, FP8)
    tensors = load_file(folder / "model.safetensors")
    new = {k: v.contiguous() for name, t in tensors.items() for k, v in encode(name, t).items()}
    write(folder, new, shards)
    settle(folder, quantization_config=settings)
    return model


def write(folder, tensors: dict, shards: bool = False) -> None:
    "Scales in another file than their numbers, with `shards`."
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + ('scale' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: t for name, t in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": files}))


def settle(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- beside transformers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_logits_are_those_of_transformers(tmp_path, family, dtype):
    pytest.importorskip("accelerate")  # without which it does not open them
    model = quantized(tmp_path / "m", CONFIGS[family], dtype)
    ours = from_pretrained(tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=dtype, experts_implementation="eager").eval()
    mine, other = state_tensors(ours), theirs.state_dict()
    names = {name: name.replace(".gate.", ".router.") if family == "gpt_oss" else name
             for name in mine}
    turned = ("experts.gate_up_proj", "experts.down_proj") if family == "gpt_oss" else ()
    changed = 0
    for name, tensor in mine.items():
        there = other[names[name]]
        there = there.mT if turned and name.endswith(turned) else there
        assert torch.equal(tensor, there), name
        assert tensor.dtype == (dtype if "e_score" not in name else torch.float32)
        changed += not torch.equal(tensor, state_tensors(model)[name])
    assert changed >= (4 if family == "gpt_oss" else 10)  # rounded, so that this is a test
    ids = torch.randint(61, (2, 12))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids, use_cache=False).logits
    if dtype == torch.float32:
        torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_is_saved_is_plain_and_the_same(tmp_path, family):
    quantized(tmp_path / "m", CONFIGS[family], torch.bfloat16)
    model = from_pretrained(tmp_path / "m")
    save_pretrained(model, tmp_path / "plain")
    hf = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in hf
    again = from_pretrained(tmp_path / "plain")
    for name, tensor in state_tensors(model).items():
        assert torch.equal(state_tensors(again)[name], tensor), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", experts_implementation="eager")
    assert theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_scales_may_be_in_another_file(tmp_path, family):
    quantized(tmp_path / "one", CONFIGS[family])
    quantized(tmp_path / "two", CONFIGS[family], shards=True)
    one, two = (state_tensors(from_pretrained(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_decoding_is_transformers_formula():
    fp8_ops = pytest.importorskip("transformers.integrations.finegrained_fp8")
    x = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    numbers, scales = encode_fp8_blocks(x, (32, 32))
    theirs = fp8_ops.Fp8Dequantize(None)._dequantize_one(numbers, scales, torch.float32)
    assert torch.equal(decode_fp8_blocks(numbers, scales, (32, 32)), theirs)


# --- the numbers ---


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (8, 12), (3, 13), (17, 4)])
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (128, 128)])
def test_blocks_that_do_not_divide_the_matrix(shape, block):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    numbers, scales = encode_fp8_blocks(x, block)
    assert scales.shape == tuple(-(-n // size) for n, size in zip(shape, block))
    expected = [[float(numbers[i, j]) * float(scales[i // block[0], j // block[1]])
                 for j in range(shape[1])] for i in range(shape[0])]
    found = decode_fp8_blocks(numbers, scales, block)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-7, atol=0)
    assert ((found - x).abs() <= x.abs() / 16 + scales.max() * 2.0**-10 * 1.01).all()


def test_every_code_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    keep = codes.float().isfinite()[0]
    assert int(keep.sum()) == 254  # two are nan
    found = decode_fp8_blocks(codes[:, keep], torch.tensor([[0.5, 2.0]]), (1, 128))
    wide = torch.tensor([0.5, 2.0]).repeat_interleave(128)[:254]
    assert torch.equal(found, codes[:, keep].float() * wide)
    with pytest.raises(ValueError, match="a number is nan"):
        decode_fp8_blocks(codes, torch.ones(1, 2), (1, 128))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="torch without E8M0")
def test_scales_that_are_powers_of_two_in_a_byte():
    scales = torch.tensor([[0.25, 8.0]])
    numbers = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).to(
        torch.float8_e4m3fn)
    found = decode_fp8_blocks(numbers, scales.to(torch.float8_e8m0fnu), (2, 4))
    assert torch.equal(found, decode_fp8_blocks(numbers, scales, (2, 4)))


def test_zeros_and_what_has_no_fp8():
    numbers, scales = encode_fp8_blocks(torch.zeros(3, 3), (2, 2))
    assert not decode_fp8_blocks(numbers, scales, (2, 2)).any()
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="no inf and no nan"):
            encode_fp8_blocks(torch.tensor([[bad]]))


def test_experts_are_decoded_one_at_a_time(monkeypatch):
    "A stack of 128 experts would need four times its memory, as float32 and as codes."
    calls = []

    def decode(blocks, scales):
        calls.append(blocks.shape)
        return decode_mxfp4(blocks, scales)

    monkeypatch.setattr(quantized_files, "decode_mxfp4", decode)
    x = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(0))
    blocks, scales = encode_mxfp4(x)
    found = quantized_files.decode_experts(blocks, scales)
    assert calls == [(6, 2, 16)] * 5
    assert torch.equal(found, decode_mxfp4(blocks, scales).mT)


def test_a_tensor_is_read_when_its_turn_comes(tmp_path, monkeypatch):
    quantized(tmp_path / "m", CONFIGS["deepseek_v3"])
    read, plain = [], quantized_files.QuantizedTensor.read

    def noted(self, reader):
        read.append(self.numbers[1])
        return plain(self, reader)

    monkeypatch.setattr(quantized_files.QuantizedTensor, "read", noted)
    model = from_pretrained(tmp_path / "m")
    order = [m.name for m in model.config.weight_map() if m.name in read]
    assert read == order and len(read) > 20


# --- what is refused, before a weight is read or while it is ---

NAME = "model.layers.0.mlp.gate_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
DAMAGE = [
    ("deepseek_v3", lambda t: t.pop(f"{NAME}_scale_inv"), f"{NAME} has no {NAME}_scale_inv"),
    ("deepseek_v3", lambda t: t.pop(NAME), f"{NAME}_scale_inv .* belongs to no quantized tensor"),
    ("deepseek_v3", lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 2)}),
     r"_scale_inv has shape \(2, 2\), .* asks for \(6, 4\)"),
    ("deepseek_v3", lambda t: t[f"{NAME}_scale_inv"].fill_(float("inf")),
     f"{NAME}: a scale is inf or nan: the file is damaged"),
    ("deepseek_v3", lambda t: t[NAME].view(torch.uint8).fill_(0x7F), f"{NAME}: a number is nan"),
    ("deepseek_v3", lambda t: t.update({"model.layers.0.extra": t[NAME].view(torch.uint8).clone()}),
     "model.layers.0.extra .* belongs to no quantized tensor"),
    ("gpt_oss", lambda t: t.pop(f"{EXPERTS}_scales"), f"{EXPERTS}_blocks has no {EXPERTS}_scales"),
    ("gpt_oss", lambda t: t.pop(f"{EXPERTS}_blocks"), f"{EXPERTS}_scales .* belongs to no"),
    ("gpt_oss", lambda t: t[f"{EXPERTS}_scales"].fill_(255),
     f"{EXPERTS}_blocks: a scale of 255 is no number"),
    ("gpt_oss", lambda t: t.update({f"{EXPERTS}_blocks": t[f"{EXPERTS}_blocks"].flatten(-2)}),
     r"blocks of stacked experts are \(E, R, G, 16\)"),
    ("gpt_oss", lambda t: t.update({
        f"{EXPERTS}_{part}": t[f"{EXPERTS}_{part}"][:, :32].contiguous()
        for part in ("blocks", "scales")}), f"{EXPERTS} has shape .* config.json asks for"),
]


@pytest.mark.parametrize("case", range(len(DAMAGE)))
def test_damage_is_named_in_one_line(tmp_path, case):
    family, change, said = DAMAGE[case]
    quantized(tmp_path / "m", CONFIGS[family])
    from_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    change(tensors)
    write(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=said) as error:
        from_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "said"), [
    ({"quant_method": "gptq", "bits": 4}, "gptq.*mxfp4, fp8, float32, bfloat16 or float16"),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({}, "weights are quantized"),
    (7, "quantization_config=7"), (FP8 | {"weight_block_size": None}, "weight_block_size=None"),
    (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size"),
    (FP8 | {"fmt": "e5m2"}, "fmt='e5m2' is not read, only 'e4m3'"),
    (FP8 | {"activation_scheme": "static"}, "activation_scheme='static'")])
def test_other_methods_are_refused_in_one_line(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said) as error:
        check_quantization(settings)
    assert "\n" not in str(error.value)
    if settings:
        quantized(tmp_path / "m", CONFIGS["qwen3"])
        settle(tmp_path / "m", quantization_config=settings)
        with pytest.raises(ValueError, match="config.json.*" + said):
            from_pretrained(tmp_path / "m")


def test_bytes_without_a_quantization_config_are_refused_as_before(tmp_path):
    quantized(tmp_path / "m", CONFIGS["qwen3"])
    settle(tmp_path / "m", quantization_config=None)
    with pytest.raises(ValueError, match="is stored as F8_E4M3; give a checkpoint in float32"):
        from_pretrained(tmp_path / "m")


def test_plain_tensors_stay_as_they_are():
    rows = {"a.weight": ("file", (3, 4), torch.bfloat16), "b.bias": ("file", (3,), torch.float32)}
    for settings in (MXFP4, FP8):
        assert whole_tensors(rows, settings) == rows
