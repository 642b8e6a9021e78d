"""Multi-token prediction: modules, labels, loss, runs, files, drafts; by loops and transformers."""

import json
import os
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from uneven import Rows

from skylar.layers.auxiliary import AuxiliaryOutput
from skylar.layers.cache import KVCache
from skylar.layers.deepseek_moe import BiasBalancingConfig
from skylar.layers.router import expert_counts
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.mixtral import MixtralConfig
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.mtp import (
    ModelWithMTP,
    MTPCache,
    MTPConfig,
    acceptance,
    draft,
    load_with_mtp,
    save_with_mtp,
    shifted_labels,
)
from skylar.models.weight_map import state_tensors
from skylar.training.checkpoint import load_weights
from skylar.training.distributed import ParallelConfig, blocks_of
from skylar.training.loss import MTPObjective, NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import Workers
from skylar.utils.recompute import Recomputed

os.environ.setdefault("HF_HUB_OFFLINE", "1")
V = 64
DENSE = Qwen3Config(vocab_size=V, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, n_layers=2,
                    d_ff=24, max_seq_len=64, init_std=0.3)
SPARSE = DeepSeekV3Config(
    vocab_size=V, d_model=16, n_heads=2, n_layers=2, first_dense=1, d_ff=24, d_expert=8,
    n_experts=4, top_k=2, n_groups=1, topk_groups=1, q_lora_rank=None, kv_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, max_seq_len=64, rope_scaling=None,
    init_std=0.3, bias_rate=0.02, sequence_loss=0.01)
GPT2 = GPT2Config(vocab_size=V, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)
FAMILIES = {"qwen3": DENSE, "deepseek_v3": SPARSE, "gpt2": GPT2}


def rough(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    "Norms and biases away from 1 and 0, so that a lost one shows."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return module.eval()


def built(config, depth=1):
    torch.manual_seed(0)
    model = CausalLM(config)
    mtp = MTPConfig(depth=depth).build(model.decoder_config)
    return rough(model), rough(mtp, 1)


def ids_of(B=2, T=12, seed=0):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


# --- modules ---


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_slot_by_itself_gives_the_same(name):
    "Depth 2, slot t: the prefix 0 .. t of hidden states, tokens up to t + 2, nothing else."
    model, mtp = built(FAMILIES[name], depth=2)
    ids = ids_of()
    one, two = mtp(model, model.model(ids), {"input_ids": ids})
    assert one.hidden.shape == (2, 11, 16) and two.hidden.shape == (2, 10, 16)
    for t in range(10):
        hidden = model.model(ids[:, :t + 1])
        first, _ = mtp.step(model, 1, hidden, ids[:, 1:t + 2])
        second, _ = mtp.step(model, 2, first, ids[:, 2:t + 3])
        torch.testing.assert_close(first[:, -1], one.hidden[:, t], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(second[:, -1], two.hidden[:, t], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_later_token_changes_no_earlier_slot(name):
    model, mtp = built(FAMILIES[name], depth=2)
    ids = ids_of()
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % V
    found = [mtp(model, model.model(x), {"input_ids": x}) for x in (ids, other)]
    for k, (a, b) in enumerate(zip(*found), 1):
        seen = 7 - k  # slots before it read tokens up to 6
        # experts multiply other rows with them: equal, but not to the last bit
        exact = {"atol": 1e-5, "rtol": 1e-5} if name == "deepseek_v3" else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(a.hidden[:, :seen], b.hidden[:, :seen], **exact)
        assert not torch.equal(a.hidden[:, seen], b.hidden[:, seen])


def test_fewer_tokens_than_depths():
    model, mtp = built(DENSE, depth=3)
    for T, n in ((1, 0), (2, 1), (3, 2), (4, 3), (5, 3)):
        ids = ids_of(T=T)
        assert len(mtp(model, model.model(ids), {"input_ids": ids})) == n


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_parameters_and_flops(config):
    model, mtp = built(config, depth=2)
    decoder, c = model.decoder_config, MTPConfig(depth=2)
    assert c.count_parameters(decoder) == sum(p.numel() for p in mtp.parameters())
    block = sum(p.numel() for p in model.model.layers[-1].parameters())
    norm = sum(p.numel() for p in model.model.norm.parameters())
    assert c.count_parameters(decoder) == 2 * (block + 2 * 16**2 + 3 * norm)
    D = decoder.d_model
    assert c.flops(decoder, 10) == 2 * (
        decoder.blocks[-1].flops(D, 10) + 4 * D**2 + 2 * D * V)


@pytest.mark.parametrize("changes", [{"depth": 0}, {"depth": 1.5}, {"weight": 0.0},
                                     {"weight": -1.0}, {"weight": float("nan")}], ids=str)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MTPConfig(**changes)


# --- labels and documents ---


def test_labels_are_shifted_once():
    ids = torch.arange(10)[None]
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    for k in (1, 2, 3):
        reads = batch["input_ids"][:, k:]
        assert torch.equal(shifted_labels(batch, k), reads + 1)


def packed(lengths=(5, 4, 1, 6)):
    "Documents in one sequence, as the loader gives them."
    ids = ids_of(1, sum(lengths), seed=3)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    labels[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": labels, "document_ids": documents,
            "position_ids": positions}


@pytest.mark.parametrize("given", [("document_ids", "position_ids"), ("document_ids",)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_separate_ones(name, given):
    model, _ = built(FAMILIES[name])
    objective = MTPObjective(model, MTPConfig(depth=2, weight=1.0)).train()
    objective.auxiliary = None  # a balance loss is one of whole sequences
    whole = packed()
    batch = {k: v for k, v in whole.items() if k in ("input_ids", "labels", *given)}
    out = objective(batch)
    parts = [objective({k: whole[k][whole["document_ids"] == d][None]
                        for k in ("input_ids", "labels")}) for d in range(4)]
    torch.testing.assert_close(out.loss_sum, sum(p.loss_sum for p in parts),
                               atol=1e-4, rtol=1e-5)
    for depth in ("mtp_loss_1", "mtp_loss_2"):
        pairs = [p.metrics[depth] for p in parts if depth in p.metrics]
        total, count = (sum(x) for x in zip(*pairs))
        assert out.metrics[depth][1] == count
        torch.testing.assert_close(out.metrics[depth][0], total, atol=1e-4, rtol=1e-5)


def test_left_padding_equals_no_padding():
    model, mtp = built(DENSE)
    ids = ids_of(1, 8)
    padded = F.pad(ids, (3, 0))
    batch = {"input_ids": padded, "document_ids": (torch.arange(11) >= 3).long()[None]}
    hidden = model.model(padded, None, batch["document_ids"])
    alone = mtp(model, model.model(ids), {"input_ids": ids})[0].hidden
    torch.testing.assert_close(mtp(model, hidden, batch)[0].hidden[:, 3:], alone,
                               atol=2e-5, rtol=1e-4)


# --- loss ---


@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_the_loss_by_loops(loss):
    model, _ = built(DENSE)
    objective = MTPObjective(model, MTPConfig(depth=2, weight=0.4), loss).train()
    ids = ids_of(3, 13)
    labels = ids[:, 1:].clone()
    labels[0, :7] = labels[2, -2:] = -100
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    out = objective(batch)
    expected, hidden, counts = 0.0, model.model(batch["input_ids"]), []
    for k in range(3):
        if k:
            hidden, _ = objective.mtp.step(model, k, hidden[:, :-1], batch["input_ids"][:, k:])
        logp, n = model.lm_head(hidden).log_softmax(-1), 0
        for b in range(3):
            for t in range(12 - k):
                if (y := int(labels[b, t + k])) != -100:
                    expected = expected - (0.2 if k else 1.0) * logp[b, t, y]
                    n += 1
        counts.append(n)
    torch.testing.assert_close(out.loss_sum, expected, atol=1e-3, rtol=1e-5)
    assert [out.n_valid, *(c for _, c in out.metrics.values())] == counts
    names = [n for n, _ in objective.named_parameters()]
    assert sum(n.startswith("mtp.") for n in names) > 10
    grads = [torch.autograd.grad(x, list(objective.parameters()), retain_graph=True)
             for x in (out.loss_sum, expected)]
    for name, a, b in zip(names, *grads):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4, msg=name)


def test_evaluation_is_of_the_next_token_alone():
    model, _ = built(DENSE)
    ids = ids_of(2, 13)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    plain = NextTokenObjective(model, z_loss=0.1).eval()(batch)
    objective = MTPObjective(model, MTPConfig(depth=2), z_loss=0.1)
    out = objective.eval()(batch)
    assert torch.equal(out.loss_sum, plain.loss_sum) and list(out.metrics) == [
        "mtp_loss_1", "mtp_loss_2"]
    assert objective.train()(batch).loss_sum > out.loss_sum + 1


def test_no_target_at_a_depth_is_no_nan():
    model, _ = built(DENSE)
    objective = MTPObjective(model, MTPConfig(depth=2)).train()
    ids = ids_of(2, 6)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 1
    out = objective({"input_ids": ids, "labels": labels})
    out.loss_sum.backward()
    assert out.n_valid == 2 and [int(c) for _, c in out.metrics.values()] == [0, 0]
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_another_ignore_index():
    model, _ = built(DENSE)
    batch = packed()
    batch["labels"] = batch["labels"].clamp(max=V - 2)  # so that V - 1 is free
    other = {**batch, "labels": batch["labels"].where(batch["labels"] != -100, V - 1)}
    torch.manual_seed(0)
    one = MTPObjective(model, MTPConfig()).train()
    torch.manual_seed(0)
    two = MTPObjective(model, MTPConfig(), ignore_index=V - 1).train()
    torch.testing.assert_close(one(batch).loss_sum, two(other).loss_sum)


# --- runs ---

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import torch.distributed as dist
from uneven import Rows
from skylar.models.decoder import CausalLM
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.mtp import MTPConfig
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import MTPObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
dist.init_process_group("gloo")
V = 64
"""


def trained(config, parallel=None, rank=0, size=1, micro=1, steps=6, out_dir=None,
            resume=False, meta=False, **train):
    "What a run leaves: all tensors of the objective, rows of metrics."
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = CausalLM(config)
        objective = MTPObjective(model, MTPConfig(depth=2, weight=0.5))
    settings = dict(steps=steps, dtype="float32", log_every=1, device="cpu", save_every=0,
                    grad_accum_steps=micro) | train
    trainer = Trainer(
        objective, Rows(micro, rank, size, alone=True), TrainConfig(**settings), quiet=True,
        optimizer=AdamWConfig(lr=3e-3), out_dir=out_dir,
        parallel=None if parallel is None else ParallelConfig(**parallel),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train(resume=resume, extend=resume)
    state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t
             for n, t in objective.state_dict().items()}
    meshes = {n: t.device_mesh.mesh_dim_names for n, t in objective.state_dict().items()
              if hasattr(t, "device_mesh")}
    return {"state": {n: t.detach().clone() for n, t in state.items()}, "rows": rows,
            "parted": {n for n, dims in meshes.items() if "experts" in dims}}


RUNS = {"qwen3": DENSE, "deepseek_v3": SPARSE}


@pytest.fixture(scope="module", params=RUNS)
def alone(request):
    return RUNS[request.param], trained(RUNS[request.param])


def assert_same(found: dict, expected: dict, exact: bool = False) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        if exact:
            assert torch.equal(found["state"][name], tensor), name
        else:
            torch.testing.assert_close(
                found["state"][name], tensor, atol=3e-5, rtol=1e-4, msg=name)


def test_a_run_moves_the_modules_and_logs_their_losses(alone):
    config, run = alone
    before = trained(config, steps=1)["state"]
    moved = [n for n, t in run["state"].items() if n.startswith("mtp.") and t.ndim > 1
             and not torch.equal(t, before[n])]
    assert len(moved) > 10
    assert all({"mtp_loss_1", "mtp_loss_2"} <= row.keys() for row in run["rows"])


def test_biases_of_the_modules_routers_move():
    biases = {n: t for n, t in trained(SPARSE)["state"].items() if n.endswith("correction_bias")}
    assert [n.split(".")[0] for n in biases] == ["model", "mtp", "mtp"]
    assert all(b.abs().max() > 0.01 for b in biases.values())


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulation_equals_one_large_batch(alone, micro):
    config, run = alone
    if config is SPARSE:  # its balance loss is a mean of micro-batches' means
        config = replace(SPARSE, sequence_loss=0.0)
        run = trained(config)
    assert_same(trained(config, micro=micro), run)


def test_recomputed_activations_change_nothing(alone):
    config, run = alone
    assert_same(trained(config, {"recompute": True}), run, exact=True)


def test_recomputation_reaches_the_blocks_of_modules():
    objective = MTPObjective(CausalLM(DENSE), MTPConfig(depth=2))
    assert len(blocks_of(objective)) == 4
    ParallelConfig(recompute=True).apply(objective, torch.device("cpu"), seed=0)
    assert all(isinstance(block, Recomputed) for block in blocks_of(objective))


def test_resumed_bit_for_bit(alone, tmp_path):
    config, run = alone
    trained(config, steps=3, out_dir=tmp_path / "run", save_every=3)
    found = trained(config, steps=6, out_dir=tmp_path / "run", resume=True, save_every=3)
    assert_same(found, run, exact=True)


def test_a_checkpoint_opens_as_the_plain_model(tmp_path):
    run = trained(DENSE, steps=2, out_dir=tmp_path / "run", save_every=2)
    model = CausalLM(DENSE)
    load_weights(tmp_path / "run", model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, run["state"][f"model.{name}"]), name


@pytest.fixture(scope="module")
def two():
    workers = Workers(2, SETUP)
    workers.define(trained)
    yield workers
    workers.close()


def on_rank(config, parallel, options):
    return trained(config, parallel, dist.get_rank(), dist.get_world_size(),  # noqa: F821
                   **options)


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {}, {"recompute": True}], ids=str)
def test_two_ranks_equal_one_process(two, alone, parallel):
    config, run = alone
    if config is SPARSE:
        config = replace(SPARSE, sequence_loss=0.0)
        run = trained(config)
    for found in two.run(on_rank, config, parallel, {"micro": 2}):
        assert_same(found, run)


def test_experts_of_the_modules_are_divided_among_ranks_too(two):
    config = replace(SPARSE, sequence_loss=0.0)
    run = trained(config)
    for found in two.run(on_rank, config, {"experts": 2}, {"micro": 2}):
        assert {n.split(".")[0] for n in found["parted"]} == {"model", "mtp"}
        assert_same(found, run)


def test_a_mask_of_padding_holds_for_routers_of_modules_too():
    "Tokens that are masked count in no layer, nor in the modules, which read fewer slots."
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=V, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24,
                           n_layers=2, n_experts=4, top_k=2, max_seq_len=64)
    objective = MTPObjective(CausalLM(config), MTPConfig()).train()
    ids, mask = ids_of(), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "attention_mask": mask}
    seen = []
    objective.auxiliary = lambda extras, batch: seen.extend(extras) or AuxiliaryOutput()
    objective(batch)
    assert [len(routed.experts) for routed in seen] == [24, 24, 22]
    for routed, length in zip(seen, (12, 12, 11)):
        kept = mask[:, :length].flatten().bool()
        expected = routed.experts[kept].flatten().bincount(minlength=4)
        assert expert_counts(routed, mask).tolist() == expected.tolist()


def test_built_on_meta_and_sharded(two):
    run = trained(DENSE, meta=True)
    for found in two.run(on_rank, DENSE, {}, {"meta": True}):
        assert_same(found, run)


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {}], ids=str)
def test_two_ranks_save_and_go_on_bit_for_bit(two, tmp_path, parallel):
    straight = two.run(on_rank, SPARSE, parallel, {})
    options = {"out_dir": tmp_path / "run", "save_every": 3}
    two.run(on_rank, SPARSE, parallel, options | {"steps": 3})
    resumed = two.run(on_rank, SPARSE, parallel, options | {"resume": True})
    for found, expected in zip(resumed, straight):
        assert_same(found, expected, exact=True)


# --- files, and transformers ---

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def open_theirs(folder):
    """The pattern that finds MTP layers is in transformers only for the published sizes."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs.set_experts_implementation("eager")
    first = theirs.config.num_hidden_layers
    pattern = "|".join(str(first + k) for k in range(theirs.config.num_mtp_layers))
    theirs._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.(?:{pattern})\..*"}
    return theirs


def their_modules(theirs):
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    return modeling.MtpModel.from_pretrained(theirs, device_map={"": "cpu"}).eval()


def drawn(seed):
    rng = random.Random(seed)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
               "mscale": 1.0, "mscale_all_dim": 1.0}
    return replace(
        SPARSE, d_model=rng.choice([16, 24]), n_layers=rng.randint(1, 3),
        first_dense=rng.choice([0, 0, 1]) if seed else 0, q_lora_rank=rng.choice([None, 12]),
        n_groups=2, topk_groups=rng.randint(1, 2), n_shared=rng.randint(1, 2),
        tie_embeddings=rng.random() < 0.5, norm_eps=rng.choice([1e-6, 1e-3]),
        interleaved=rng.random() < 0.7, rope_scaling=rng.choice([None, scaling]))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_logits_and_gradients_equal_transformers_through_files(tmp_path, seed, depth):
    config = drawn(seed)
    if config.first_dense >= config.n_layers:
        config = replace(config, first_dense=0)
    model, mtp = built(config, depth)
    theirs = open_theirs(save_with_mtp(model, mtp, tmp_path / "model"))
    reference, ids = their_modules(theirs), ids_of(2, 12)
    ours = mtp(model, model.model(ids), {"input_ids": ids})
    hidden, pairs = theirs.model(ids).last_hidden_state, []
    for k, out in enumerate(ours, 1):
        positions = torch.arange(k, 12)[None].expand(2, -1)
        hidden = reference.forward_layer(k - 1, hidden[:, :12 - k], positions, None,
                                         input_ids=ids[:, k:])
        pairs.append((mtp.logits(model, out.hidden), theirs.lm_head(hidden)))
        torch.testing.assert_close(*pairs[-1], atol=1e-4, rtol=1e-4)
    for side in zip(*pairs):
        sum(F.cross_entropy(x.flatten(0, 1), ids[:, k:].flatten())
            for k, x in enumerate(side, 1)).backward()
    shared = ["model.embed_tokens.weight", "model.norm.weight"]
    for name in shared:
        torch.testing.assert_close(model.get_parameter(name).grad, theirs.get_parameter(name).grad,
                                   atol=1e-4, rtol=1e-3)
    for one, other in zip(mtp.layers, reference.layers):
        names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "post_norm"}
        for part in ("self_attn.o_proj", "mlp.gate", "mlp.shared_experts.up_proj"):
            names[f"block.{part}"] = f"mtp_block.{part}"
        for mine, its in names.items():
            torch.testing.assert_close(
                one.get_submodule(mine).weight.grad, other.get_submodule(its).weight.grad,
                atol=1e-4, rtol=1e-3, msg=mine)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again(tmp_path, name, dtype):
    model, mtp = (part.to(dtype) for part in built(FAMILIES[name], depth=2))
    save_with_mtp(model, mtp, tmp_path / "model", max_shard_size=20_000)
    for found, part in zip(load_with_mtp(tmp_path / "model", dtype), (model, mtp)):
        state = part.state_dict()
        assert found.state_dict().keys() == state.keys()
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype, key


def test_names_are_those_of_the_published_files(tmp_path):
    model, mtp = built(SPARSE)
    folder = save_with_mtp(model, mtp, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    names = {n for n in load_file(folder / "model.safetensors") if n.startswith("model.layers.2.")}
    rest = {n.removeprefix("model.layers.2.") for n in names}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
            "input_layernorm.weight", "self_attn.kv_b_proj.weight", "mlp.gate.weight",
            "mlp.gate.e_score_correction_bias", "mlp.experts.3.down_proj.weight",
            "mlp.shared_experts.up_proj.weight"} <= rest
    assert len(rest) == 4 + sum(m.name.startswith("model.layers.1.") for m in SPARSE.weight_map())


def test_copies_of_embedding_and_head_in_published_files_are_passed_over(tmp_path):
    model, mtp = built(SPARSE)
    folder = save_with_mtp(model, mtp, tmp_path / "model")
    change(folder, {"model.layers.2.embed_tokens.weight": model.model.embed_tokens.weight.clone(),
                    "model.layers.2.shared_head.head.weight": model.lm_head.weight.clone()})
    _, found = load_with_mtp(folder)
    assert_same({"state": found.state_dict()}, {"state": mtp.state_dict()}, exact=True)
    assert_same({"state": from_pretrained(folder).state_dict()}, {"state": model.state_dict()},
                exact=True)


def test_what_cannot_be_saved_or_opened_is_said_in_one_line(tmp_path):
    model, mtp = built(GPT2)
    with pytest.raises(ValueError, match="gpt2 name their layers in another way"):
        save_with_mtp(model, mtp, tmp_path / "a")
    own = CausalLM(DENSE.decoder())
    with pytest.raises(ValueError, match="DecoderConfig has no equal in transformers"):
        save_with_mtp(own, MTPConfig().build(own.decoder_config), tmp_path / "b")
    dense = CausalLM(replace(SPARSE, first_dense=2))
    with pytest.raises(ValueError, match="first_dense=2 leaves no sparse layer"):
        save_with_mtp(dense, MTPConfig().build(dense.decoder_config), tmp_path / "c")
    folder = save_pretrained(CausalLM(SPARSE), tmp_path / "d")
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        load_with_mtp(folder)
    assert not any((tmp_path / x).exists() for x in "abc")
    from_pretrained(folder)  # saved without modules it opens as before


def change(folder, tensors=(), **config):
    "Other tensors and values in a folder that was saved."
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | config))
    if tensors:
        held = load_file(folder / "model.safetensors") | dict(tensors)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("limit", [20_000, 10**9])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_a_folder_with_modules_opens_as_the_plain_model(tmp_path, caplog, name, limit):
    model, mtp = built(FAMILIES[name], depth=2)
    found = from_pretrained(save_with_mtp(model, mtp, tmp_path / "model", max_shard_size=limit))
    assert_same({"state": found.state_dict()}, {"state": model.state_dict()}, exact=True)
    (line,) = caplog.messages
    assert "tensors of layers for multi-token prediction are left out" in line
    assert "\n" not in line and str(tmp_path / "model") in line
    caplog.clear()
    from_pretrained(save_pretrained(model, tmp_path / "plain"))
    assert not caplog.messages


@pytest.mark.parametrize("config, names", [
    ({"num_nextn_predict_layers": 0}, []), ({"num_nextn_predict_layers": None}, []),
    ({"num_nextn_predict_layers": "1"}, []), ({}, ["model.layers.3.enorm.weight"]),
    ({}, ["model.mtp.enorm.weight"]), ({}, ["model.layers.1.enorm.weight"])], ids=str)
def test_any_other_tensor_too_many_is_an_error(tmp_path, config, names):
    folder = save_with_mtp(*built(SPARSE), tmp_path / "model")
    change(folder, {name: torch.ones(16) for name in names}, **config)
    with pytest.raises(ValueError, match="holds .* for which config.json has no place"):
        from_pretrained(folder)


@pytest.mark.parametrize("opened", [from_pretrained, load_with_mtp])
def test_a_flipped_bit_in_a_module_is_found(tmp_path, opened):
    folder = save_with_mtp(*built(SPARSE), tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names, notes = file.keys(), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    tensors["model.layers.2.eh_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata=notes)
    with pytest.raises(ValueError, match="damaged"):
        opened(folder)


@cache
@torch.enable_grad()
def learned(depth):
    "A model that has memorized one sequence, with its modules."
    torch.manual_seed(0)
    objective = MTPObjective(CausalLM(replace(SPARSE, init_std=0.1)),
                             MTPConfig(depth=depth, weight=1.0))
    line = torch.randperm(24, generator=torch.Generator().manual_seed(5)).repeat(4)[None]
    batch = {"input_ids": line[:, :60], "labels": line[:, 1:61]}
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for _ in range(150):
        out = objective(batch)
        optimizer.zero_grad()
        (out.loss_sum / out.n_valid).backward()
        optimizer.step()
    return objective.eval(), line


@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_drafts_with_our_files(tmp_path, depth):
    objective, line = learned(depth)
    theirs = open_theirs(save_with_mtp(objective.model, objective.mtp, tmp_path / "model"))
    their_modules(theirs)
    found = {}
    for use_mtp in (False, True):
        passes = []
        hook = theirs.model.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        out = theirs.generate(line[:, :16], max_new_tokens=24, do_sample=False,
                              **({"use_mtp": True} if use_mtp else {}))
        hook.remove()
        found[use_mtp] = out, len(passes)
    assert torch.equal(found[True][0], found[False][0])
    assert found[False][1] == 24 and found[True][1] < 20


# --- drafts ---


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gpt2"])
@torch.no_grad()
def test_a_draft_with_a_cache_equals_one_without(name, depth):
    "Prompt, then pieces of one to three tokens; guesses of the round before are wrong."
    model, mtp = built(FAMILIES[name], depth)
    ids, cache, at = ids_of(2, 26), MTPCache(mtp, 2), 0
    for n in (1, 9, 1, 2, 1, 3, 1):
        hidden = model.model(ids[:, :at + n])
        guesses, logits = draft(model, mtp, hidden[:, at:], ids[:, at + 1:at + n + 1], cache)
        at += n
        tokens, states = ids[:, 1:at + 1], hidden
        for k in range(1, depth + 1):
            states, _ = mtp.step(model, k, states, tokens)
            expected = mtp.logits(model, states[:, -1])
            torch.testing.assert_close(logits[:, k - 1], expected, atol=1e-4, rtol=1e-4)
            tokens = torch.cat([tokens[:, 1:], guesses[:, k - 1:k]], 1)
    assert guesses.shape == (2, depth) and logits.shape == (2, depth, V)


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_speculative_text_is_the_greedy_one(depth):
    objective, line = learned(depth)
    for model, mtp in ((objective.model, objective.mtp), built(DENSE, depth)):
        ids, K = line[:, :10], depth
        plain = ids
        for _ in range(24):
            plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], 1)
        cache, drafts, passes = KVCache(model.config, 1), MTPCache(mtp, 1), 0
        hidden = model.model(ids, cache=cache)
        new = model.lm_head(hidden[:, -1:]).argmax(-1)
        tokens, text = torch.cat([ids[:, 1:], new], 1), torch.cat([ids, new], 1)
        while text.shape[1] < 34:
            guesses, _ = draft(model, mtp, hidden, tokens, drafts)
            hidden = model.model(torch.cat([new, guesses], 1), cache=cache)
            choice = model.lm_head(hidden).argmax(-1)
            n = int((guesses == choice[:, :-1]).cumprod(1).sum())
            cache.crop(cache.length - K + n)
            hidden, tokens = hidden[:, :n + 1], choice[:, :n + 1]
            new, text, passes = tokens[:, -1:], torch.cat([text, tokens], 1), passes + 1
        assert torch.equal(text[:, :34], plain)
        if mtp is objective.mtp:
            assert passes < 20


@torch.no_grad()
def test_acceptance_by_loops():
    model, mtp = built(DENSE, depth=2)
    batch = packed()
    where = batch["position_ids"], batch["document_ids"]
    choice = model(batch["input_ids"], *where).argmax(-1)[0]
    found = acceptance(model, mtp, batch)
    outs = mtp(model, model.model(batch["input_ids"], *where), batch)
    for k, (out, (accepted, drafted)) in enumerate(zip(outs, found), 1):
        guesses = mtp.logits(model, out.hidden).argmax(-1)[0]
        slots = [t for t in range(16 - k) if out.labels[0, t] != -100]
        assert drafted == len(slots)
        assert accepted == sum(int(guesses[t] == choice[t + k]) for t in slots)


def test_the_files_config_counts_every_tensor_once():
    model, mtp = built(SPARSE, depth=2)
    names = [m.name for m in ModelWithMTP(SPARSE, 2).weight_map()]
    assert len(names) == len(set(names))
    numbers = sum(p.numel() for p in (*model.parameters(), *mtp.parameters()))
    assert numbers == count_parameters(SPARSE) + MTPConfig(depth=2).count_parameters(
        SPARSE.decoder())
    assert isinstance(SPARSE.decoder().auxiliary, BiasBalancingConfig)
    assert len(state_tensors(model)) < len(names)
