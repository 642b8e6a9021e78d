"""Adapters: LoRA, DoRA and QLoRA by formula and against peft; prompts, prefixes, side networks."""

import json

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden
from ranks import check_two_ranks
from torch import nn

from skylar.layers.cache import KVCache
from skylar.models.decoder import CausalLM
from skylar.models.families.llama3 import Llama3Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.posttrain.adapters import (
    AdapterConfig,
    adapters_off,
    load_adapter,
    load_prompt,
    open_adapted,
    save_adapter,
    save_prompt,
)
from skylar.posttrain.peft import (
    LAYERS,
    NF4,
    LoRAConfig,
    NF4Weight,
    Prefix,
    PrefixObjective,
    PromptEmbedding,
    PromptObjective,
    QLoRALinear,
    SideObjective,
    adapter_parameters,
    adapters,
    dequantize_nf4,
    merge,
    nf4_bytes,
    quantize_nf4,
    read_states,
    remove,
    training_bytes,
    unmerge,
)
from skylar.posttrain.stages import open_stage, train_stage
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import OptimizerConfig
from skylar.training.run import LoaderConfig, load_run
from skylar.training.trainer import TrainConfig
from skylar.utils.lesson import asset

KINDS = ("lora", "dora", "qlora")
IDS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:]}


def adapted(model, kind="lora", seed=0, **options):
    "With updates that are not zero."
    torch.manual_seed(seed)
    LoRAConfig(kind=kind, **{"rank": 4} | options).attach(model)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.normal_(std=0.1)
            if kind == "dora":
                layer.lora_magnitude_vector.mul_(1.1)
    return model.eval()


# --- layers ---


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "dora_rslora"])
def test_equals_peft(name):
    case = golden("peft")[name]
    given = case.leaves()
    config = LoRAConfig(kind="dora" if given["dora"] else "lora", rank=given["rank"],
                        alpha=given["alpha"], rslora=given["rslora"])
    linear = nn.Linear(*given["weight"].T.shape).double()
    linear.weight.data, linear.bias.data = given["weight"].detach(), given["bias"].detach()
    layer = LAYERS[config.kind](linear, config).double()
    ours = {"lora_A": layer.lora_A, "lora_B": layer.lora_B, "x": given["x"]}
    layer.lora_A.data, layer.lora_B.data = given["lora_A"].detach(), given["lora_B"].detach()
    if given["dora"]:
        layer.lora_magnitude_vector.data = given["magnitude"].detach()
        ours["magnitude"] = layer.lora_magnitude_vector
    y = layer(given["x"])
    torch.testing.assert_close(y, case.outputs["y"])
    (y * given["upstream"]).sum().backward()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, case.gradients[key], msg=key)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_nothing_changes_at_the_start(tiny_model, kind):
    expected = tiny_model()(IDS)
    model = LoRAConfig(kind=kind).attach(tiny_model())
    torch.testing.assert_close(model(IDS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_as_many_as_the_formula_says(tiny_model, kind):
    plain = tiny_model()
    config = LoRAConfig(kind=kind, rank=3)
    wanted = adapter_parameters(plain, config)
    model = config.attach(tiny_model())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == wanted == adapter_parameters(model, config)
    assert all(".lora_" in name for name in trained)
    out = NextTokenObjective(model)(BATCH)
    out.loss_sum.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_names_of_the_base_models_tensors_stay(tiny_model):
    plain, model = tiny_model(), LoRAConfig().attach(tiny_model())
    assert set(plain.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    assert LoRAConfig(rank=4, alpha=16.0, rslora=rslora).scaling == scaling


def test_dropout_is_on_the_adapters_input_alone(tiny_model):
    model = adapted(tiny_model(), dropout=0.5)
    layer = next(adapters(model))[1].train()
    x = torch.randn(400, layer.in_features)
    torch.testing.assert_close(layer.frozen(x), F.linear(x, layer.weight, layer.bias))
    drawn = torch.stack([layer(x) for _ in range(50)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - layer.eval()(x)).abs().mean() < 0.3 * drawn.std(0).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_keeps_its_dtype(tiny_model, kind):
    model = adapted(tiny_model().bfloat16(), kind)
    layer = next(adapters(model))[1]
    assert layer.lora_A.dtype == torch.float32 and model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(tiny_model, kind):
    model = adapted(tiny_model(), kind)
    expected = model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        found = NextTokenObjective(model)(BATCH)
    found.loss_sum.backward()
    assert found.loss_sum.isfinite() and next(adapters(model))[1].lora_B.grad.dtype == (
        torch.float32)
    assert expected.dtype == torch.float32


def test_attach_refuses(tiny_model):
    with pytest.raises(ValueError, match="no linear layer 'c_attn'; choose from .*q_proj"):
        LoRAConfig(targets=("c_attn",)).attach(tiny_model())
    with pytest.raises(ValueError, match="no linear layer 'model.layers.9"):
        LoRAConfig().attach(tiny_model(), {"model.layers.9.mlp.up_proj"})
    with pytest.raises(ValueError, match="has adapters already"):
        LoRAConfig().attach(LoRAConfig().attach(tiny_model()))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"kind": "ia3"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAConfig(**wrong)


# --- merging ---


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merge_and_unmerge(tiny_model, kind):
    model, plain = adapted(tiny_model(), kind), tiny_model()
    expected = model(IDS)
    assert not torch.allclose(expected, plain(IDS), atol=1e-3)
    merged = merge(model)(IDS)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(merge(model)(IDS), merged)  # once is enough
    unmerge(model)
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [False, True])
def test_removed_adapters_leave_plain_layers(tiny_model, kind, first, tmp_path):
    model = adapted(tiny_model(), kind)
    expected = model(IDS)
    if first and kind != "qlora":
        merge(model)
    remove(model)
    assert not list(adapters(model)) and all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(tiny_model().state_dict())
    torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-4)
    save_pretrained(model, tmp_path / "model")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("first", [False, True])
def test_removed_without_a_trace(tiny_model, kind, first):
    model = adapted(tiny_model(), kind)
    if first:
        merge(model)
    remove(model, merged=False)
    torch.testing.assert_close(model(IDS), tiny_model()(IDS), atol=1e-5, rtol=1e-4)


def test_four_bits_hold_no_update(tiny_model):
    with pytest.raises(ValueError, match="4-bit weights"):
        merge(adapted(tiny_model(), "qlora"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_switched_off(tiny_model, kind):
    model = adapted(tiny_model(), kind)
    expected = model(IDS)
    with adapters_off(model):
        torch.testing.assert_close(model(IDS), tiny_model()(IDS))
    assert torch.equal(model(IDS), expected)
    with pytest.raises(ValueError, match="are merged"), adapters_off(merge(model)):
        pass


# --- four bits ---


def test_the_levels_are_quantiles():
    p = [torch.linspace(0.9677083, 0.5, n, dtype=torch.double)[:-1] for n in (9, 8)]
    levels = torch.cat([torch.special.ndtri(p[0]), -torch.special.ndtri(p[1]), torch.zeros(1)])
    torch.testing.assert_close((levels / levels.max()).sort().values,
                               torch.tensor(NF4, dtype=torch.double), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000])
def test_each_number_becomes_the_nearest_level(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize_nf4(x)
    assert codes.dtype == torch.uint8 and len(codes) == 32 * len(scales)
    found = dequantize_nf4(codes, scales)[:n]
    levels = torch.tensor(NF4)
    for start in range(0, n, 64):
        block = x[start:start + 64]
        scale = block.abs().max()
        nearest = (block[:, None] / scale - levels).abs().argmin(1)
        torch.testing.assert_close(found[start:start + 64], levels[nearest] * scale)


def test_levels_are_kept_exactly_and_zeros_stay_zeros():
    x = torch.cat([torch.tensor(NF4).repeat(4) * 3.5, torch.zeros(64)])
    assert torch.equal(dequantize_nf4(*quantize_nf4(x)), x)


def test_the_first_of_two_is_in_the_upper_half():  # as in bitsandbytes
    x = torch.zeros(64)
    x[0] = 1.0
    assert int(quantize_nf4(x)[0][0]) == 15 << 4 | 7


@pytest.mark.parametrize("shape", [(64, 64), (5, 7), (300, 200)])
def test_double_quantization_costs_little(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 20
    once = dequantize_nf4(*quantize_nf4(weight))[:weight.numel()].view(shape)
    stored = NF4Weight(weight)
    assert (stored.full() - once).norm() < 0.01 * weight.norm()
    assert (stored.full() - weight).norm() < 0.12 * weight.norm()
    assert sum(b.nbytes for b in stored.buffers()) == nf4_bytes(weight.numel())
    assert not list(stored.parameters())


def test_bits_a_weight():
    assert abs(8 * nf4_bytes(2**30) / 2**30 - (4 + 8 / 64 + 32 / 64 / 256)) < 1e-6


def test_the_product_and_its_gradient():
    linear = nn.Linear(70, 33)
    layer = QLoRALinear(linear, LoRAConfig(kind="qlora"))
    assert layer.weight is None and "weight" not in dict(layer.named_parameters())
    x = torch.randn(2, 5, 70, requires_grad=True)
    u = torch.randn(2, 5, 33)
    ours = torch.autograd.grad((layer.frozen(x) * u).sum(), x)
    theirs = torch.autograd.grad((F.linear(x, layer.full_weight(), layer.bias) * u).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_no_full_matrix_is_kept_for_the_backward_pass():
    layer = QLoRALinear(nn.Linear(64, 96, bias=False), LoRAConfig(kind="qlora", rank=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                  lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert kept and max(kept) < 64 * 96


def test_memory_of_a_large_model_by_formula():
    with torch.device("meta"):
        model = CausalLM(Llama3Config())
    assert abs(training_bytes(model) / 1e9 - 16 * 8.03) < 0.1
    lora, qlora = (training_bytes(model, LoRAConfig(kind=k, rank=16)) for k in ("lora", "qlora"))
    assert adapter_parameters(model, LoRAConfig(rank=16)) == 41_943_040  # as peft says
    assert 16e9 < lora < 17e9 and 6e9 < qlora < 7e9


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_a_small_model_is_what_is_held(tiny_model, kind):
    config = LoRAConfig(kind=kind)
    expected = training_bytes(tiny_model(), config, itemsize=4)
    model = config.attach(tiny_model())
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tables = {id(b) for m in model.modules() for name, b in m.named_buffers(recurse=False)
              if name in m._non_persistent_buffers_set}
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()] if id(t) not in tables)
    assert held + 12 * n == expected


# --- files ---


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_saved_and_loaded(tiny_model, tmp_path, kind, family):
    model = adapted(tiny_model(family), kind, alpha=6.0, rslora=True)
    config = LoRAConfig(kind=kind, rank=4, alpha=6.0, rslora=True)
    save_adapter(model, tmp_path / "adapter", config)
    again = tiny_model(family).eval()
    assert load_adapter(again, tmp_path / "adapter").scaling == config.scaling
    assert torch.equal(again(IDS), model(IDS))


def test_loaded_beside_four_bits(tiny_model, tmp_path):
    model = adapted(tiny_model())
    save_adapter(model, tmp_path / "adapter", LoRAConfig(rank=4))
    again = tiny_model().eval()
    load_adapter(again, tmp_path / "adapter", "qlora")
    assert isinstance(next(adapters(again))[1], QLoRALinear)
    assert not torch.equal(again(IDS), model(IDS))
    for (_, a), (_, b) in zip(adapters(model), adapters(again), strict=True):
        assert torch.equal(a.lora_B, b.lora_B)


def test_files_that_cannot_be_read(tiny_model, tmp_path):
    save_adapter(adapted(tiny_model()), tmp_path / "a", LoRAConfig(rank=4))
    path = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(path.read_text())
    for changes, message in (
        ({"peft_type": "LOHA"}, "a LOHA adapter"), ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"), ({"r": 5}, "has shape")):
        path.write_text(json.dumps(settings | changes))
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / "a")
        assert not list(adapters(model))
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no layer for"):
        load_adapter(tiny_model(n_layers=1), tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(tiny_model(), tmp_path / "b", LoRAConfig())


def test_gpt2s_fused_projections_have_no_file(tiny_model, tmp_path):
    model = LoRAConfig(targets=("q_proj",)).attach(tiny_model("gpt2"))
    with pytest.raises(ValueError, match="no tensor of its own"):
        save_adapter(model, tmp_path / "a", LoRAConfig())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_opens_ours_and_we_open_its(tiny_model, tmp_path, kind):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_pretrained(tiny_model(), tmp_path / "base")
    model = adapted(tiny_model(), kind)
    save_adapter(model, tmp_path / "ours", LoRAConfig(kind=kind, rank=4))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=3e-5, rtol=1e-4)
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.mul_(-0.5)
        theirs.save_pretrained(tmp_path / "theirs")
        again = tiny_model().eval()
        load_adapter(again, tmp_path / "theirs")
        torch.testing.assert_close(again(IDS), theirs(IDS).logits, atol=3e-5, rtol=1e-4)
        assert not torch.allclose(again(IDS), model(IDS), atol=1e-3)


def prompts(make):
    torch.manual_seed(0)
    return {"prompt": PromptObjective(make().eval(), torch.arange(5)),
            "prefix": PrefixObjective(make().eval(), 5)}


@torch.no_grad()
def moved(objective):
    for p in objective.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return objective


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_prompts_saved_and_loaded(tiny_model, tmp_path, name):
    one, other = moved(prompts(tiny_model)[name]), prompts(tiny_model)[name]
    save_prompt(one, tmp_path / "p")
    assert not torch.equal(one(BATCH).loss_sum, other(BATCH).loss_sum)
    load_prompt(other, tmp_path / "p")
    assert torch.equal(one(BATCH).loss_sum, other(BATCH).loss_sum)
    wrong = prompts(tiny_model)[{"prompt": "prefix", "prefix": "prompt"}[name]]
    with pytest.raises(ValueError, match="_TUNING"):
        load_prompt(wrong, tmp_path / "p")
    longer = PromptObjective(tiny_model(), torch.arange(6)) if name == "prompt" else (
        PrefixObjective(tiny_model(), 6))
    with pytest.raises(ValueError, match="this model and length need"):
        load_prompt(longer, tmp_path / "p")


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_peft_opens_our_prompts_and_we_open_its(tiny_model, tmp_path, name):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_pretrained(tiny_model(), tmp_path / "base")
    one, other = moved(prompts(tiny_model)[name]), prompts(tiny_model)[name]
    save_prompt(one, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    with torch.no_grad():
        logits = theirs(BATCH["input_ids"]).logits[:, -BATCH["input_ids"].shape[1]:]
        loss = F.cross_entropy(logits.flatten(0, 1), BATCH["labels"].flatten(), reduction="sum")
        torch.testing.assert_close(one.eval()(BATCH).loss_sum, loss, atol=1e-3, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    load_prompt(other, tmp_path / "theirs")
    torch.testing.assert_close(other.eval()(BATCH).loss_sum, one(BATCH).loss_sum)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stages_checkpoint_opens_as_a_plain_model(tiny_model, kind, tmp_path):
    config = AdapterConfig(kind=kind, rank=4)
    model = config.attach(tiny_model()).eval()
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.normal_(std=0.1)
    found = open_adapted(tiny_model(), vars(config), lambda m: m.load_state_dict(
        model.state_dict())).eval()
    torch.testing.assert_close(found(IDS), model(IDS), atol=1e-5, rtol=1e-4)
    assert not list(adapters(found))
    config.save(model, tmp_path, "base")
    config.save(model, tmp_path, "base")  # there already
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    plain = AdapterConfig()
    assert plain.attach(found) is found and not list(adapters(found))


# --- training ---


def objectives(make):
    torch.manual_seed(0)
    made = {kind: NextTokenObjective(LoRAConfig(kind=kind).attach(make())) for kind in KINDS}
    made["prompt"] = PromptObjective(make(), torch.arange(5))
    made["prefix"] = PrefixObjective(make(), 5)
    made["side"] = SideObjective(make(), 4)
    return made


@pytest.mark.parametrize(("name", "norm", "wanted"), [
    ("lora", 30, 0.1), ("dora", 30, 0.1), ("qlora", 30, 0.1), ("side", 1, 0.1),
    ("prompt", 10, 0.95), ("prefix", 10, 0.7)])  # a random frozen model lets these do no more
def test_ten_examples_are_learned_and_the_base_stays(tiny_model, name, norm, wanted):
    def make():  # a frozen head of small weights after a norm bounds the logits
        model = tiny_model()
        model.model.norm.weight.data.mul_(norm)
        return model

    objective, plain = objectives(make)[name], make().state_dict()
    ids = torch.randint(97, (10, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    trained = [p for p in objective.parameters() if p.requires_grad]
    adam, losses = torch.optim.Adam(trained, 2e-2), []
    for _ in range(150):
        out, _ = objective(batch), adam.zero_grad()
        (out.loss_sum / out.n_valid).backward()
        adam.step()
        losses.append((out.loss_sum / out.n_valid).item())
    assert losses[-1] < wanted * losses[0]
    state = objective.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in plain.items() if n in state)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_targets_in_a_second_document_are_refused(tiny_model, name):
    objective, documents = objectives(tiny_model)[name], torch.zeros_like(BATCH["input_ids"])
    documents[:, 5:] = 1
    with pytest.raises(ValueError, match="pack=False"):
        objective(BATCH | {"document_ids": documents})


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_padding_as_a_document_of_its_own_changes_nothing(tiny_model, name):
    objective = objectives(tiny_model)[name]
    expected = objective(BATCH).loss_sum
    ids, steps = F.pad(BATCH["input_ids"], (0, 3)), torch.tensor([*range(8), *range(3)])
    batch = {"input_ids": ids, "labels": F.pad(BATCH["labels"], (0, 3), value=-100),
             "position_ids": steps.expand(2, -1),
             "document_ids": F.pad(torch.zeros_like(BATCH["labels"]), (0, 3), value=1)}
    torch.testing.assert_close(objective(batch).loss_sum, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
def test_a_prefix_of_real_tokens_is_these_tokens(tiny_model, family):
    model = tiny_model(family).eval()
    start, rest = IDS[:1, :4], IDS[:1, 4:]
    cache = KVCache(model.config, 1, 4, torch.float32)
    prefix = Prefix(model.decoder_config, 4)
    with torch.no_grad():
        model(start, cache=cache)
        for i, kv in enumerate(prefix.kv):
            kv.copy_(torch.stack([cache[i].keys[0], cache[i].values[0]]))
        expected = model(torch.cat([start, rest], 1))[:, 4:]
        torch.testing.assert_close(model(rest, cache=prefix), expected, atol=1e-5, rtol=1e-4)
        two = model(rest.repeat(3, 1), cache=prefix)
        torch.testing.assert_close(two, expected.repeat(3, 1, 1), atol=1e-5, rtol=1e-4)


def test_a_prompt_of_real_tokens_is_these_tokens(tiny_model):
    model = tiny_model().eval()
    start, rest = IDS[:1, :4], IDS[:1, 4:]
    expected = model(torch.cat([start, rest], 1))[:, 4:]
    model.model.embed_tokens = PromptEmbedding(model.model.embed_tokens, start[0])
    virtual = torch.arange(97, 101)[None]
    torch.testing.assert_close(model(torch.cat([virtual, rest], 1))[:, 4:], expected)
    assert model(rest).shape[-1] == 97
    assert model.lm_head.weight is model.model.embed_tokens.weight or (
        not model.decoder_config.tie_embeddings)


def test_the_side_network_sends_no_gradient_into_the_decoder(tiny_model):
    objective = SideObjective(tiny_model(), 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden, states = read_states(objective.model.model, BATCH["input_ids"])
    assert not kept and len(states) == 3 and not hidden.requires_grad
    assert not objective.model.model.layers[0]._forward_hooks
    torch.testing.assert_close(objective(BATCH).loss_sum,
                               NextTokenObjective(tiny_model())(BATCH).loss_sum)


def test_adapters_survive_the_fused_decoder_and_generation(tiny_model):
    from skylar.inference.cpu_fused import why_not_fused
    from skylar.inference.generate import generate

    model = adapted(tiny_model())
    assert why_not_fused(model).endswith("is a LoRALinear")
    expected = generate(model, IDS[:1], 25, 0.0)
    assert torch.equal(generate(remove(model), IDS[:1], 25, 0.0), expected)


# --- in a stage ---


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Who speaks in scene {i}?"},
                          {"role": "assistant", "content": f"The king, {i} times."}]}
            for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage_of(chats, out, kind, **changes):
    from skylar.posttrain.sft import SFTStage

    return SFTStage(
        model=str(asset("shakespeare")), data=str(chats), out=str(out), val_fraction=0.0,
        adapter=AdapterConfig(kind=kind, rank=4), loader=LoaderConfig(batch_size=2, seq_len=128),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
        train=TrainConfig(steps=4, eval_every=0, save_every=2, log_every=1, dtype="float32"),
        **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_stage_goes_on_and_leaves_a_plain_model_and_an_adapter(chats, tmp_path, kind):
    assert train_stage(open_stage(stage_of(chats, tmp_path / "whole", kind)), quiet=True).finished
    part = open_stage(stage_of(chats, tmp_path / "part", kind))
    assert train_stage(part, (lambda row: row["step"] == 2,), quiet=True).step == 2
    again = open_stage(stage_of(chats, tmp_path / "part", kind, resume=True))
    assert train_stage(again, quiet=True).finished
    models = [load_run(tmp_path / name)[0] for name in ("whole", "part")]
    begun = from_pretrained(asset("shakespeare")).float()
    for model in models:
        assert not list(adapters(model)) and set(model.state_dict()) == set(begun.state_dict())
    ours, theirs = (model.state_dict() for model in models)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5)
    load_adapter(begun, tmp_path / "whole" / "adapter", kind)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(remove(begun).eval()(ids), models[0](ids), atol=1e-4, rtol=1e-4)
    save_pretrained(models[0], tmp_path / "export")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_the_adapter_that_one_trains(chats, tmp_path, strategy):
    words = ["sft", "--model", asset("shakespeare"), "--data", chats, "--adapter.kind", "lora",
             "--val_fraction", 0, "--parallel.strategy", strategy, "--loader.batch_size", 2,
             "--loader.seq_len", 128, "--train.steps", 3, "--train.log_every", 1,
             "--train.eval_every", 0, "--train.dtype", "float32", "--optimizer.lr", "1e-3"]
    check_two_ranks(words, tmp_path)


def test_an_export_that_would_lose_an_adapter_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="is of an adapter"):
        save_pretrained(adapted(tiny_model()), tmp_path / "model")
    assert not (tmp_path / "model").exists()
