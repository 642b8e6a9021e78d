"""GPT-2's weights as Hugging Face stores them, under Skylar's names: shared by tests."""

from torch import Tensor

NAMES = {  # theirs -> ours, applied in this order
    "transformer.": "model.",
    ".h.": ".layers.",
    ".wte.": ".embed_tokens.",
    ".wpe.": ".embed_positions.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".ln_f.": ".norm.",
    ".attn.c_attn.": ".self_attn.qkv.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}


def from_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    "Rename, transpose what a Conv1D holds as (in, out), and split the fused q, k, v."
    ours = {}
    for name, tensor in tensors.items():
        if ".c_" in name and tensor.ndim == 2:
            tensor = tensor.T  # (in, out) -> (out, in)
        for theirs, mine in NAMES.items():
            name = name.replace(theirs, mine)
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):  # each (D, D) or (D,)
                ours[name.replace("qkv", f"{letter}_proj")] = part
        else:
            ours[name] = tensor
    return ours
