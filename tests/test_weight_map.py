"""Weight maps: which tensor of a file is which parameter, whole, fused, transposed or in part."""

import itertools

import pytest
import torch

from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.gpt_oss import GptOssConfig
from skylar.models.presets import FAMILIES, get_config
from skylar.models.weight_map import TensorMapping, check_weight_map, same_names, state_tensors

E, F, D = 3, 4, 2


def numbers(*shape: int, start: int = 0) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float32).reshape(shape)


PARAMETERS = {
    "q": numbers(4, D), "k": numbers(2, D, start=100), "v": numbers(2, D, start=200),
    "bias": numbers(5), "gate_up": numbers(E, 2 * F, D), "down": numbers(E, D, F, start=500),
    **{f"expert{i}": numbers(F, D, start=1000 * i) for i in range(E)},
}
P = PARAMETERS
CASES = [  # mapping, and the tensor that the file must have
    (dict(parameters=("bias",)), P["bias"]),
    (dict(parameters=("q",), transposed=True), P["q"].T),
    (dict(parameters=("q", "k", "v")), torch.cat([P["q"], P["k"], P["v"]])),
    (dict(parameters=("q", "k", "v"), transposed=True),
     torch.cat([P["q"], P["k"], P["v"]]).T),
    (dict(parameters=("down",), index=1), P["down"][1]),
    (dict(parameters=("down",), index=2, transposed=True), P["down"][2].T),
    (dict(parameters=("gate_up",), index=1, rows=(0, F)), P["gate_up"][1, :F]),
    (dict(parameters=("gate_up",), index=1, rows=(F, 2 * F)), P["gate_up"][1, F:]),
    (dict(parameters=("q",), rows=(1, 3)), P["q"][1:3]),
    (dict(parameters=("gate_up",), transposed=True), P["gate_up"].transpose(1, 2)),
    (dict(parameters=("expert0", "expert1", "expert2"), stacked=True),
     torch.stack([P["expert0"], P["expert1"], P["expert2"]])),
    (dict(parameters=("expert0", "expert1", "expert2"), stacked=True, transposed=True),
     torch.stack([P["expert0"].T, P["expert1"].T, P["expert2"].T])),
    (dict(parameters=("q", "k"), stacked=True, rows=(0, 2)),
     torch.stack([P["q"][:2], P["k"]])),
]


@pytest.mark.parametrize("fields, expected", CASES, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_is_joined_and_loaded(fields, expected, device):
    mapping = TensorMapping(name="t", **fields)
    shapes = {name: t.to(device) for name, t in PARAMETERS.items()}
    assert mapping.shape(shapes) == tuple(expected.shape)
    if device == "meta":
        return
    joined = mapping.join(PARAMETERS)
    assert torch.equal(joined, expected) and joined.is_contiguous()
    empty = {name: torch.full_like(t, -1) for name, t in PARAMETERS.items()}
    mapping.load(expected, empty)
    assert torch.equal(mapping.join(empty), expected)
    changed = sum(int((empty[name] != -1).sum()) for name in empty)
    assert changed == expected.numel(), "nothing else is touched"
    for name in mapping.parameters:
        touched = empty[name] != -1
        assert torch.equal(empty[name][touched], PARAMETERS[name][touched])


def test_loading_converts_the_dtype():
    mapping = TensorMapping(name="t", parameters=("q",), transposed=True)
    parameters = {"q": torch.zeros(4, D, dtype=torch.bfloat16)}
    mapping.load(P["q"].T.double(), parameters)
    assert torch.equal(parameters["q"], P["q"].bfloat16())


def experts(rows=(0, F)) -> list[TensorMapping]:
    "The map of a Mixtral-like layer: a file for each expert's gate and up, ours stacked."
    return [TensorMapping(name=f"{i}.{name}", parameters=("gate_up",), index=i, rows=part)
            for i in range(E) for name, part in (("gate", rows), ("up", (F, 2 * F)))]


def test_every_number_must_come_from_one_tensor():
    parameters = {"gate_up": P["gate_up"]}
    check_weight_map(experts(), parameters)
    for wrong in (experts()[:-1], experts(rows=(0, F - 1)), experts(rows=(1, F + 1)),
                  experts() + experts()[:1]):
        often = "numbers of gate_up . to . times; each must come once"
        with pytest.raises(ValueError, match=often):
            check_weight_map(wrong, parameters)


def test_stacked_experts_through_files_both_ways():
    files = {m.name: m.join(PARAMETERS) for m in experts()}
    assert {t.shape for t in files.values()} == {(F, D)} and len(files) == 2 * E
    back = {"gate_up": torch.empty_like(P["gate_up"])}
    for mapping in experts():
        mapping.load(files[mapping.name], back)
    assert torch.equal(back["gate_up"], P["gate_up"])


SMALL = dict(vocab_size=40, d_model=16, n_layers=3, d_ff=24, max_seq_len=8)
MORE = {"deepseek_v3": dict(first_dense=1, n_experts=4, d_expert=8, top_k=2, n_groups=2,
                            topk_groups=1)}  # all others: d_head=4


@pytest.mark.parametrize("family, tied", list(itertools.product(FAMILIES, [True, False])))
def test_every_family_maps_every_parameter_once(family, tied):
    more = MORE.get(family.name, dict(d_head=4))
    config = get_config("test", family.name, **SMALL, **more, tie_embeddings=tied)
    model = CausalLM(config)
    parameters = state_tensors(model)
    check_weight_map(config.weight_map(), parameters)
    names = [mapping.name for mapping in config.weight_map()]
    assert len(set(names)) == len(names)
    if family is GptOssConfig:  # whose files have experts stacked, as we do, but transposed
        assert len(names) == len(parameters)
    elif any(".experts." in name for name in parameters):  # files have them one by one
        assert len(names) > len(parameters)
    elif family is not GPT2Config:
        assert names == list(parameters) and config.weight_map() == same_names(config)
