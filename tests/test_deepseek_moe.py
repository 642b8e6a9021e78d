"""DeepSeekMoE: the layer against transformers, and a bias that is moved once a global step.

Runs of a small model: micro-batches, two ranks, recomputed activations and resumed runs must count
the same tokens, and hence leave the same biases, bit for bit.
"""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulty import NotFinite
from safetensors.torch import load_file
from torch import nn
from uneven import Rows

from skylar.layers.block import BlockConfig
from skylar.layers.deepseek_moe import (
    BiasBalancingConfig,
    DeepSeekMoEConfig,
    GroupedSigmoidConfig,
    GroupedSigmoidRouter,
    group_limited_topk,
    max_violation,
    sequence_balance_loss,
)
from skylar.layers.gqa import GQAConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.router import RouterOutput, TopKConfig, expert_counts
from skylar.models.decoder import CausalLM, DecoderConfig, count_parameters, forward_flops
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import config_from_dict, config_to_dict
from skylar.models.weight_map import check_weight_map, same_names, state_tensors
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import Workers

BIAS = "e_score_correction_bias"

# --- against transformers ---


def random_config(rng) -> DeepSeekMoEConfig:
    "A small valid config; now and then one group, one allowed group, all experts, none shared."
    groups = rng.choice((1, 1, 2, 4))
    size = rng.choice((2, 3, 4, 8))
    allowed = rng.randint(1, groups)
    top_k = rng.choice((1, 2, allowed * size, rng.randint(1, allowed * size)))
    router = GroupedSigmoidConfig(
        n_experts=groups * size, top_k=min(top_k, allowed * size), n_groups=groups,
        topk_groups=allowed, scale=rng.choice((1.0, 2.5, 2.827)), normalize=rng.random() < 0.8)
    return DeepSeekMoEConfig(router=router, d_ff=rng.choice((8, 20)), n_shared=rng.randint(0, 2))


def theirs_of(config: DeepSeekMoEConfig, d_model: int):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    r = config.router
    return modeling.DeepseekV3MoE(DeepseekV3Config(
        hidden_size=d_model, moe_intermediate_size=config.d_ff, n_routed_experts=r.n_experts,
        num_experts_per_tok=r.top_k, n_group=r.n_groups, topk_group=r.topk_groups,
        norm_topk_prob=r.normalize, routed_scaling_factor=r.scale,
        n_shared_experts=max(1, config.n_shared)))


def filled(config: DeepSeekMoEConfig, d_model: int):
    layer = config.build(d_model)
    layer.init_weights(0.3, 0.3)
    layer.gate.e_score_correction_bias.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("seed", range(24))
def test_layer_and_gradients_equal_transformers(seed):
    config, d_model = random_config(random.Random(seed)), 16
    torch.manual_seed(seed)
    ours, theirs = filled(config, d_model), theirs_of(config, d_model)
    theirs.load_state_dict(ours.state_dict(), strict=config.n_shared > 0)
    if not config.n_shared:
        nn.init.zeros_(theirs.shared_experts.down_proj.weight)
    x = torch.randn(2, 9, d_model)
    a, b, upstream = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn_like(x)
    (found, routed), expected = ours(a), theirs(b)
    logits, weights, experts = theirs.gate(x)
    torch.testing.assert_close(routed.logits, logits)
    assert torch.equal(routed.experts, experts)
    torch.testing.assert_close(routed.weights, weights)
    torch.testing.assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, msg=name)


def test_the_random_configs_reach_every_corner():
    drawn = [random_config(random.Random(seed)) for seed in range(24)]
    routers = [config.router for config in drawn]
    for found in ({c.n_shared == 0 for c in drawn}, {r.n_groups == 1 for r in routers},
                  {r.top_k == r.n_experts for r in routers}, {r.top_k == 1 for r in routers},
                  {1 < r.topk_groups < r.n_groups for r in routers},
                  {r.normalize for r in routers}):
        assert found == {True, False}


def test_deepseek_v2_lite_is_the_same_layer_with_a_softmax_router():
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    from transformers import DeepseekV2Config

    router = TopKConfig(n_experts=8, top_k=3, normalize=False)
    ours = DeepSeekMoEConfig(router=router, d_ff=12, n_shared=2).build(16)
    ours.init_weights(0.3, 0.3)
    theirs = modeling.DeepseekV2Moe(DeepseekV2Config(
        hidden_size=16, moe_intermediate_size=12, n_routed_experts=8, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=3, n_shared_experts=2, topk_method="greedy",
        routed_scaling_factor=1.0))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x)[0], theirs(x))


# --- the router ---


def router_of(**changes) -> GroupedSigmoidRouter:
    sizes = dict(n_experts=16, top_k=4, n_groups=4, topk_groups=2, scale=2.5)
    torch.manual_seed(0)
    router = GroupedSigmoidConfig(**sizes | changes).build(32)
    router.init_weights(0.3, 0.3)
    router.e_score_correction_bias.normal_(std=0.3)
    return router


def test_the_bias_selects_and_does_not_weight():
    router, x = router_of(), torch.randn(100, 32)
    before = router(x)
    router.e_score_correction_bias += 0.7  # the same for all: no choice changes
    after = router(x)
    assert torch.equal(before.experts.sort().values, after.experts.sort().values)
    router.e_score_correction_bias[:3] -= 0.5
    after = router(x)
    same = (before.experts.sort().values == after.experts.sort().values).all(-1)
    assert 5 < same.sum() < 95
    dense = [torch.zeros(100, 16).scatter(1, r.experts, r.weights)[same] for r in (before, after)]
    torch.testing.assert_close(*dense)
    assert not router.e_score_correction_bias.requires_grad
    assert BIAS not in dict(router.named_parameters())


def test_experts_of_other_groups_are_never_chosen_even_if_all_scores_are_negative():
    biased = -1 - torch.rand(500, 16, generator=torch.Generator().manual_seed(0))
    experts = group_limited_topk(biased, 4, 2, 8)
    assert all(len(set((row // 4).tolist())) == 2 for row in experts)
    assert all(len(set(row.tolist())) == 8 for row in experts)


def test_groups_of_one_expert():
    biased = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    one = group_limited_topk(biased, 8, 3, 3).sort().values
    assert torch.equal(one, biased.topk(3).indices.sort().values)


def test_autocast_does_not_round_the_scores():
    router, x = router_of(), torch.randn(64, 32)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.logits, cast.logits) and cast.logits.dtype == torch.float32
    assert torch.equal(plain.experts, cast.experts)


def test_scores_that_underflow_give_no_nan():
    router = router_of()
    nn.init.constant_(router.weight, -200.0)
    routed = router(torch.ones(3, 32))
    assert routed.weights.isfinite().all()


@pytest.mark.parametrize(("changes", "said"), [
    (dict(n_groups=3), "n_groups=3 does not divide n_experts=16; give a divisor"),
    (dict(topk_groups=5), "topk_groups=5 of n_groups=4: lower topk_groups"),
    (dict(top_k=9), "top_k=9: topk_groups=2 groups have only 8 experts; lower top_k"),
    (dict(top_k=0), "top_k=0: give a whole number of at least 1"),
    (dict(scale=0.0), "scale=0.0: give a number above 0"),
])
def test_impossible_routers_are_refused_in_one_line(changes, said):
    sizes = dict(n_experts=16, top_k=4, n_groups=4, topk_groups=2)
    with pytest.raises(ValueError) as error:
        GroupedSigmoidConfig(**sizes | changes)
    assert str(error.value) == said


def test_impossible_balancing_and_layers_are_refused():
    with pytest.raises(ValueError, match="rate=-0.1: give a number above 0"):
        BiasBalancingConfig(rate=-0.1)
    with pytest.raises(ValueError, match="sequence=nan"):
        BiasBalancingConfig(sequence=float("nan"))
    with pytest.raises(ValueError, match="n_shared=-1"):
        DeepSeekMoEConfig(router=TopKConfig(n_experts=4, top_k=1), d_ff=8, n_shared=-1)
    assert BiasBalancingConfig(rate=0).rate == 0  # DeepSeek-V3's last 500B tokens


# --- the bias stays in fp32 ---


@pytest.mark.parametrize("convert", [
    lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(),
    lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16), copy.deepcopy])
def test_the_bias_stays_in_fp32_and_keeps_its_numbers(convert):
    router = router_of()
    bias = router.e_score_correction_bias.clone()
    converted = convert(nn.Sequential(router))[0]
    assert torch.equal(converted.e_score_correction_bias, bias)
    assert converted.e_score_correction_bias.dtype == torch.float32


def test_from_meta_the_bias_is_fp32_and_starts_at_zero():
    with torch.device("meta"):
        router = GroupedSigmoidConfig(n_experts=16, top_k=4).build(32)
    assert router(torch.empty(5, 32, device="meta")).experts.shape == (5, 4)
    router.to(torch.bfloat16).to_empty(device="cpu")
    assert router.weight.dtype == torch.bfloat16
    router.init_weights(0.1, 0.1)
    bias = router.e_score_correction_bias
    assert bias.dtype == torch.float32 and bias.device.type == "cpu" and not bias.any()


def test_a_default_dtype_of_bf16_does_not_reach_the_bias():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = GroupedSigmoidConfig(n_experts=4, top_k=1).build(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert router.e_score_correction_bias.dtype == torch.float32


# --- a model of it ---

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import torch.distributed as dist
from faulty import NotFinite
from torch import nn
from uneven import Rows
from skylar.layers.block import BlockConfig
from skylar.layers.deepseek_moe import BiasBalancingConfig, DeepSeekMoEConfig
from skylar.layers.deepseek_moe import GroupedSigmoidConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.training.distributed import ParallelConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
dist.init_process_group("gloo")
"""


def decoder_config(auxiliary=None) -> DecoderConfig:
    router = GroupedSigmoidConfig(n_experts=8, top_k=2, n_groups=4, topk_groups=2, scale=1.5)
    norm = RMSNormConfig()
    block = BlockConfig(attention=GQAConfig(n_heads=2, qk_norm=norm), norm=norm,
                        ffn=DeepSeekMoEConfig(router=router, d_ff=12))
    return DecoderConfig(vocab_size=64, d_model=16, blocks=(block,) * 2, max_seq_len=32,
                         norm=norm, init_std=0.3, residual_std=0.2, auxiliary=auxiliary)


def trained(parallel=None, rank=0, size=1, micro=1, steps=6, bad=None, out_dir=None,
            resume=False, auxiliary=None, meta=False, **train):
    "What a run leaves: biases, counts and `keep` of its steps, weights, rows of metrics."
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = CausalLM(decoder_config(auxiliary or BiasBalancingConfig(rate=0.02)))
    objective, seen = NotFinite(model), []
    objective.bad, move = bad, objective.after_step

    def after_step(statistics, keep):
        seen.append((statistics["expert_counts"].clone(), bool(keep)))
        move(statistics, keep)

    objective.after_step = after_step
    settings = dict(steps=steps, dtype="float32", log_every=1, device="cpu", save_every=0,
                    grad_accum_steps=micro) | train
    trainer = Trainer(
        objective, Rows(micro, rank, size), TrainConfig(**settings), quiet=True,
        optimizer=AdamWConfig(lr=3e-3), out_dir=out_dir,
        parallel=None if parallel is None else ParallelConfig(**parallel),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train(resume=resume, extend=resume)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p
             for n, p in model.named_parameters()}
    biases = torch.stack([b for n, b in model.named_buffers() if n.endswith("correction_bias")])
    return {"biases": biases.clone(), "counts": [c for c, _ in seen],
            "keep": [k for _, k in seen], "rows": rows,
            "weights": {n: p.detach().clone() for n, p in whole.items()}}


@pytest.fixture(scope="module")
def alone():
    return trained()


def assert_same_counts(found: dict, expected: dict, exact: bool = False) -> None:
    assert len(found["counts"]) == len(expected["counts"])
    for a, b in zip(found["counts"], expected["counts"]):
        assert torch.equal(a, b)
    assert torch.equal(found["biases"], expected["biases"])
    for name, weight in expected["weights"].items():
        if exact:
            assert torch.equal(found["weights"][name], weight), name
        else:
            torch.testing.assert_close(found["weights"][name], weight, atol=2e-5, rtol=1e-4)


def test_a_run_moves_biases_as_the_paper_does(alone):
    biases = torch.zeros(2, 8)
    for counts in alone["counts"]:
        assert (counts.sum(-1) == 8 * 16 * 2).all()  # every token, masked targets too
        biases += 0.02 * (counts.mean(-1, keepdim=True) - counts).sign()
    assert torch.equal(alone["biases"], biases) and biases.abs().min() >= 0
    assert biases.abs().max() > 0.05 and alone["biases"].dtype == torch.float32
    assert all("max_violation" in row for row in alone["rows"])


@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation_counts_as_one_large_batch(alone, micro):
    found = trained(micro=micro)
    assert len(found["counts"]) == 6  # once a step, not once a micro-batch
    assert_same_counts(found, alone)


def test_recomputed_activations_are_not_counted_twice(alone):
    found = trained({"recompute": True})
    assert_same_counts(found, alone, exact=True)


def test_recomputed_micro_batches_choose_the_experts_of_their_forward_pass(alone):
    assert_same_counts(trained({"recompute": True}, micro=4), alone)


def test_a_skipped_step_leaves_the_biases(alone):
    found = trained(bad=3)
    assert found["keep"] == [True, True, False, True, True, True]
    moves = torch.zeros(2, 8)
    for counts, keep in zip(found["counts"], found["keep"]):
        moves += 0.02 * keep * (counts.mean(-1, keepdim=True) - counts).sign()
    assert torch.equal(found["biases"], moves)
    assert not torch.equal(found["biases"], alone["biases"])


def test_resumed_bit_for_bit(alone, tmp_path):
    trained(steps=3, out_dir=tmp_path / "run", save_every=3)
    found = trained(steps=6, out_dir=tmp_path / "run", resume=True, save_every=3)
    assert len(found["counts"]) == 3
    assert torch.equal(found["biases"], alone["biases"])
    for name, weight in alone["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


@pytest.fixture(scope="module")
def two():
    workers = Workers(2, SETUP)
    workers.define(decoder_config, trained)
    yield workers
    workers.close()


def on_rank(parallel, options):
    return trained(parallel, dist.get_rank(), dist.get_world_size(), **options)  # noqa: F821


@pytest.mark.parametrize("parallel", [
    {"strategy": "ddp"}, {}, {"recompute": True}, {"reshard": False}], ids=str)
def test_two_ranks_equal_one_process(two, alone, parallel):
    for found in two.run(on_rank, parallel, {"micro": 2}):
        assert_same_counts(found, alone)


def test_built_on_meta_and_sharded_the_biases_start_at_zero_in_fp32(two):
    alone = trained(meta=True)
    assert alone["biases"].any()
    for found in two.run(on_rank, {}, {"meta": True}):
        assert_same_counts(found, alone)
        assert found["biases"].dtype == torch.float32


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {}], ids=str)
def test_two_ranks_save_and_go_on_bit_for_bit(two, tmp_path, parallel):
    straight = two.run(on_rank, parallel, {})
    options = {"out_dir": tmp_path / "run", "save_every": 3}
    two.run(on_rank, parallel, options | {"steps": 3})
    for found, expected in zip(two.run(on_rank, parallel, options | {"resume": True}), straight):
        assert torch.equal(found["biases"], expected["biases"])
        for name, weight in expected["weights"].items():
            assert torch.equal(found["weights"][name], weight), name


# --- balancing ---


def test_the_centered_variant_chooses_the_same_and_does_not_drift():
    torch.manual_seed(0)
    crowded = torch.tensor([2.0, 2.0, *[0.0] * 14])  # two experts above the mean, 14 below
    scores = (torch.randn(400, 16) + crowded).sigmoid()
    bias, centered = torch.zeros(16), torch.zeros(16)
    for _ in range(100):
        experts = group_limited_topk(scores + bias, 4, 2, 4)
        others = group_limited_topk(scores + centered, 4, 2, 4)
        assert torch.equal(experts.sort().values, others.sort().values)
        counts = torch.bincount(experts.flatten(), minlength=16).float()
        move = 0.0078125 * (counts.mean() - counts).sign()  # a power of two: sums are exact
        bias += move
        centered += move - move.mean()
    assert centered.mean().abs() < 1e-6 < 0.05 < bias.mean()
    assert max_violation(counts) < 0.5


def test_a_centered_run_has_the_moves_of_the_plain_one_less_their_mean():
    found = trained(steps=1, auxiliary=BiasBalancingConfig(rate=0.02, centered=True))
    counts = found["counts"][0]
    move = 0.02 * (counts.mean(-1, keepdim=True) - counts).sign()
    torch.testing.assert_close(found["biases"], move - move.mean(-1, keepdim=True))


def test_a_rate_of_zero_leaves_the_biases():
    found = trained(steps=2, auxiliary=BiasBalancingConfig(rate=0))
    assert not found["biases"].any() and len(found["counts"]) == 2


def test_sequence_balance_loss_by_loops_and_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3 * 7, 6, requires_grad=True)
    routed = RouterOutput(logits, torch.ones(21, 2), torch.zeros(21, 2, dtype=torch.long))
    expected = 0
    for sequence in logits.sigmoid().view(3, 7, 6):
        shares = sequence / sequence.sum(-1, keepdim=True)
        for i in range(6):
            f = sum(i in s.topk(2).indices.tolist() for s in sequence) * 6 / (2 * 7)
            expected = expected + f * shares[:, i].mean() / 3
    found = sequence_balance_loss(routed, 3)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_sequence_loss_joins_the_training_loss_only():
    torch.manual_seed(0)
    plain = NextTokenObjective(CausalLM(decoder_config(BiasBalancingConfig())))
    other = NextTokenObjective(CausalLM(decoder_config(BiasBalancingConfig(sequence=0.5))))
    other.load_state_dict(plain.state_dict())
    batch = next(iter(Rows()))
    a, b = plain(batch), other(batch)
    _, extras = plain.model.model(batch["input_ids"], return_extras=True)
    more = 0.5 * sum(sequence_balance_loss(routed, 8) for routed in extras)
    torch.testing.assert_close(b.loss_sum, a.loss_sum + more * a.n_valid)
    plain.eval(), other.eval()
    torch.testing.assert_close(plain(batch).loss_sum, other(batch).loss_sum)


def test_max_violation():
    assert max_violation(torch.full((8,), 3.0)) == 0
    counts = expert_counts(RouterOutput(torch.zeros(5, 8), torch.ones(5, 2),
                                        torch.tensor([[0, 1]] * 5)))
    assert max_violation(counts) == 8 / 2 - 1


# --- files ---


def test_stored_with_the_weights_and_mapped_once():
    model = CausalLM(decoder_config())
    names = [n for n in state_tensors(model) if n.endswith(BIAS)]
    assert names == [f"model.layers.{i}.mlp.gate.{BIAS}" for i in range(2)]
    check_weight_map(same_names(decoder_config()), state_tensors(model))
    with pytest.raises(ValueError, match=BIAS):
        check_weight_map([m for m in same_names(decoder_config()) if m.name != names[0]],
                         state_tensors(model))


def with_biases(config) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith(BIAS):
            buffer.normal_()
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_with_its_biases_in_fp32(tmp_path, dtype):
    config = decoder_config(BiasBalancingConfig(rate=0.01, centered=True, sequence=1e-4))
    model = with_biases(config).to(dtype)
    save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "skylar"
    stored = load_file(tmp_path / "model/model.safetensors")
    kinds = {n.rsplit(".", 1)[1]: t.dtype for n, t in stored.items() if "mlp.gate." in n}
    assert kinds == {"weight": dtype, BIAS: torch.float32}
    for wanted in (None, torch.bfloat16):
        back = from_pretrained(tmp_path / "model", dtype=wanted)
        assert back.config == config
        assert back.lm_head.weight.dtype == (wanted or dtype)
        for (name, a), (_, b) in zip(model.named_buffers(), back.named_buffers()):
            if name.endswith(BIAS):
                assert torch.equal(a, b) and b.dtype == torch.float32
    ids = torch.randint(64, (2, 9))
    torch.testing.assert_close(from_pretrained(tmp_path / "model")(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_it_with_its_biases_in_fp32(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    import skylar.models.auto  # noqa: F401  registers the classes

    model = with_biases(decoder_config()).to(dtype)
    save_pretrained(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    found = {n: b for n, b in theirs.named_buffers() if n.endswith(BIAS)}
    expected = [b for n, b in model.named_buffers() if n.endswith(BIAS)]
    assert len(found) == len(expected) == 2
    for a, b in zip(found.values(), expected):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    if dtype == torch.float32:  # in bf16 rounding decides near ties, here and there
        ids = torch.randint(64, (2, 9))
        torch.testing.assert_close(theirs(ids).logits, model(ids))


def test_config_round_trip_and_costs():
    config = decoder_config(BiasBalancingConfig(sequence=1e-4))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    moe = config.blocks[0].ffn
    wider = replace(config, blocks=(replace(
        config.blocks[0], ffn=replace(moe, router=replace(moe.router, n_experts=16))),) * 2)
    extra = 2 * 8 * (16 + 3 * 16 * 12)  # 2 layers, 8 experts more: gate rows and matrices
    assert count_parameters(wider) - count_parameters(config) == extra
    assert forward_flops(wider, 4) - forward_flops(config, 4) == 2 * 2 * 16 * 8  # the gate's


def test_padding_moves_no_bias():
    "The counts of a padded batch are those of its tokens alone."
    torch.manual_seed(0)
    layer = DeepSeekMoEConfig(
        router=GroupedSigmoidConfig(n_experts=8, top_k=2), d_ff=8).build(16)
    layer.init_weights(0.1, 0.1)
    x, mask = torch.randn(2, 6, 16), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    _, routed = layer(x)
    _, alone = layer(torch.cat([x[0], x[1, 2:]])[None])
    balancing = BiasBalancingConfig()
    padded = balancing([routed], {"input_ids": mask, "attention_mask": mask})
    tokens = balancing([alone], {"input_ids": mask[:1]})
    assert torch.equal(padded.sums["expert_counts"], tokens.sums["expert_counts"])
    assert padded.sums["expert_counts"].sum() == 2 * mask.sum()
