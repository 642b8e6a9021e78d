"""Experts shared among processes: the run of one process, its gradients, checkpoints and plan."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from skylar.layers.moe import ClampedExperts, Experts, sort_by_expert
from skylar.models.decoder import count_parameters
from skylar.training.distributed import ParallelConfig
from skylar.training.expert_parallel import arrivals, share_experts, split_dim
from skylar.training.planner import (
    blocks_of,
    make_plan,
    mesh_of,
    model_config,
    plain_run,
    remedies,
    repeats,
    simulate,
    simulate_any_depth,
    with_experts,
)
from skylar.training.run import LoaderConfig, RunConfig, TrainConfig
from skylar.utils.lesson import Workers
from skylar.utils.processes import WholeDraws
from skylar.utils.sharded_matrices import own_range, own_rows

WORKER = Path(__file__).with_name("expert_worker.py")


def train(folder: Path, n: int, **settings) -> dict:
    out = folder / f"result-{n}-{abs(hash(json.dumps(settings, sort_keys=True)))}.pt"
    launch(n, WORKER, out, json.dumps(settings))
    return torch.load(out)


def assert_same_run(found: dict, alone: dict) -> None:
    "Losses, norms, weights and moments; the bounds are those of test_distributed.py."
    assert len(found["rows"]) == len(alone["rows"]) > 0
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)
    assert found["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=2e-4, rtol=0)
        assert (weight - alone["start"][name]).abs().max() > 1e-3  # far more than the bound
    assert found["moments"].keys() == alone["moments"].keys()
    for name, moment in alone["moments"].items():
        torch.testing.assert_close(found["moments"][name], moment, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs of one process by settings, made once."
    made, folder = {}, tmp_path_factory.mktemp("alone")

    def alone(**settings) -> dict:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = train(folder, 1, **settings)
        return made[key]

    return alone


# --- the same run as alone ---


@pytest.mark.parametrize(("n", "settings", "mine"), [
    (2, {"experts": 2}, 4),  # each rank has half of the experts, whole
    (2, {"experts": 2, "reshard": True, "recompute": True}, 4),
    (4, {"experts": 2}, 4),  # two ranks share the same half
    (4, {"experts": 4}, 2),
    (4, {"experts": 2, "replicas": 2}, 4),
], ids=str)
def test_the_same_run_as_alone_at_unequal_target_counts(runs, tmp_path, n, settings, mine):
    found = train(tmp_path, n, **settings)
    assert_same_run(found, runs())
    assert found["local_experts"] <= mine  # before FSDP gathers: a part of this rank's


@pytest.mark.parametrize("kind", ["clamped", "deepseek"])
def test_biases_of_experts_and_of_routers(runs, tmp_path, kind):
    found, alone = train(tmp_path, 2, kind=kind, experts=2), runs(kind=kind)
    assert_same_run(found, alone)
    assert len(found["biases"]) == (2 if kind == "deepseek" else 0)
    for ours, theirs in zip(found["biases"], alone["biases"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)  # signs of equal counts
        assert theirs.abs().max() > 0


@pytest.mark.parametrize("n_experts", [8, 6])  # 3 experts of a rank: FSDP splits their rows
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_experts_that_do_not_divide_are_split_by_rows(runs, tmp_path, optimizer, n_experts):
    model = {"optimizer": optimizer, "n_experts": n_experts, "kind": "clamped"}
    assert_same_run(train(tmp_path, 4, experts=2, **model), runs(**model))


def test_plain_fsdp_of_fewer_experts_than_ranks_splits_their_rows(runs, tmp_path):
    found = train(tmp_path, 4, n_experts=3)
    assert_same_run(found, runs(n_experts=3))
    assert found["local_experts"] == 3  # a quarter of each, where the fourth rank had none


def test_blocks_are_compiled_around_the_exchange(runs, tmp_path):
    assert_same_run(train(tmp_path, 2, experts=2, compile_blocks=True), runs())


def test_an_expert_without_tokens_on_any_rank(runs, tmp_path):
    found, alone = train(tmp_path, 2, unused=5, experts=2), runs(unused=5)
    assert_same_run(found, alone)
    name = "model.layers.0.mlp.experts.down_proj"
    name = next(n for n in alone["weights"] if n.endswith(name))
    start, end = alone["start"][name], found["weights"][name]
    decayed = start[5] * (1 - 3e-3 * 0.1) ** len(alone["rows"])
    torch.testing.assert_close(end[5], decayed, atol=1e-6, rtol=0)
    assert (end[4] - start[4]).abs().max() > 1e-3
    assert not found["moments"][f"{name} exp_avg"][5].any()


def test_from_meta_the_first_weights_do_not_depend_on_the_number_of_ranks(tmp_path):
    one, *others = (train(tmp_path, n, meta=True, steps=1, **settings) for n, settings in (
        (1, {}), (2, {"experts": 2}), (4, {"experts": 4}), (4, {"experts": 2})))
    for name, weight in one["start"].items():
        assert weight.abs().max() > 0
        assert all(torch.equal(found["start"][name], weight) for found in others)


def test_bf16_gathers_stay_close_to_autocast_alone(runs, tmp_path):
    found = train(tmp_path, 2, experts=2, dtype="bfloat16", gather_dtype="bfloat16")
    alone = runs(dtype="bfloat16")
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-2)


# --- checkpoints ---


@pytest.mark.parametrize(("first", "then"), [
    ((2, {"experts": 2}), (1, {})),
    ((1, {}), (2, {"experts": 2})),
    ((2, {"experts": 2}), (4, {"experts": 2})),
    ((2, {}), (2, {"experts": 2})),  # sharded by FSDP alone before
    ((4, {"experts": 4}), (2, {"experts": 2})),
], ids=str)
def test_a_run_goes_on_at_another_number_of_ranks(runs, tmp_path, first, then):
    (n, settings), (m, others), out = first, then, str(tmp_path / "run")
    train(tmp_path, n, out_dir=out, steps=3, **settings)
    found = train(tmp_path, m, out_dir=out, steps=6, resume=True, **others)
    assert len(found["rows"]) == 6
    for ours, theirs in zip(found["rows"], runs()["rows"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)
    for name, weight in runs()["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=2e-4, rtol=0)


def test_resumed_at_the_same_number_of_ranks_bit_for_bit(tmp_path):
    settings, out = {"experts": 2, "kind": "deepseek"}, str(tmp_path / "run")
    straight = train(tmp_path, 2, **settings)
    train(tmp_path, 2, out_dir=out, steps=3, **settings)
    resumed = train(tmp_path, 2, out_dir=out, steps=6, resume=True, **settings)
    for name, weight in straight["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    shutil.rmtree(out)


# --- the layer alone, on two processes ---

SETUP = """
import copy
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from skylar.layers.moe import ClampedExperts, Experts
from skylar.training.expert_parallel import share_experts
dist.init_process_group("gloo")
"""


def layer(counts, capacity=None, dtype=None):
    "Outputs and gradients of a layer whose ranks have `counts` tokens, beside one process's."
    torch.manual_seed(0)
    E, k, D, F = 4, 2, 8, 6
    alone = Experts(E, D, F)
    alone.init_weights(0.3, 0.3)
    x, chosen = torch.randn(sum(counts), D), torch.randn(sum(counts), E).topk(k).indices
    weights, out_grad = torch.rand(sum(counts), k), torch.randn(sum(counts), D)
    if capacity == "one expert":  # all tokens of all ranks
        chosen = torch.tensor([[3, 2]]).expand(sum(counts), k)
    shared = copy.deepcopy(alone)
    share_experts(nn.ModuleList([shared]), init_device_mesh("cpu", (2,), mesh_dim_names=("e",)))
    rows = x.split(counts), weights.split(counts), chosen.split(counts), out_grad.split(counts)
    rank = dist.get_rank()

    def outcome(experts, x, w, c, g):
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = experts(x, w, c)
        (y.float() * g).sum().backward()
        return [y.detach(), x.grad, w.grad], [p.grad for p in experts.parameters()]

    (y, of_x, of_w), of_alone = outcome(alone, x, weights, chosen, out_grad)
    found, of_shared = outcome(shared, *(part[rank] for part in rows))
    wanted = [t.split(counts)[rank] for t in (y, of_x, of_w)]
    local = [g.to_local() for g in of_shared]
    theirs = [g.chunk(2)[rank] for g in of_alone]
    return max((a - b).abs().max().item() if a.numel() else 0.0
               for a, b in zip(found + local, wanted + theirs))


def clamped():
    "As `layer`, for experts with biases."
    torch.manual_seed(0)
    alone = ClampedExperts(4, 8, 6, 1.7, 7.0)
    alone.init_weights(0.3, 0.3)
    for bias in (alone.gate_up_proj_bias, alone.down_proj_bias):
        nn.init.normal_(bias)
    shared = copy.deepcopy(alone)
    share_experts(nn.ModuleList([shared]), init_device_mesh("cpu", (2,), mesh_dim_names=("e",)))
    x, chosen = torch.randn(10, 8), torch.randn(10, 4).topk(2).indices
    rank, weights = dist.get_rank(), torch.rand(10, 2)
    wanted = alone(x, weights, chosen)
    wanted.sum().backward()
    mine = [t.split([3, 7])[rank] for t in (x, weights, chosen)]
    y = shared(*mine)
    y.sum().backward()
    pairs = [(y, wanted.split([3, 7])[rank])]
    pairs += [(p.grad.to_local(), q.grad.chunk(2)[rank])
              for p, q in zip(shared.parameters(), alone.parameters(), strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def two():
    workers = Workers(2, SETUP)
    yield workers
    workers.close()


@pytest.mark.parametrize("counts", [[5, 5], [1, 12], [7, 2]], ids=str)
def test_a_layer_equals_that_of_one_process(two, counts):
    assert max(two.run(layer, counts)) < 2e-6


def test_all_tokens_of_all_ranks_to_one_ranks_experts(two):
    assert max(two.run(layer, [3, 6], "one expert")) < 2e-6  # rank 0 computes nothing


def test_a_layer_in_bf16(two):
    assert max(two.run(layer, [5, 9], None, torch.bfloat16)) < 0.1


# --- pieces ---


def test_arrivals_are_sorted_by_expert_and_then_by_rank():
    arriving = torch.tensor([[1, 1], [1, 2]])  # (ranks, experts here): B C | f d e
    to = arrivals(arriving, 5)
    assert to.source.tolist() == [0, 2, 1, 3, 4]  # B f | C d e
    assert to.row.tolist() == [0, 2, 1, 3, 4]
    assert to.counts.tolist() == [2, 3]
    nothing = arrivals(torch.zeros(2, 3, dtype=torch.long), 0)
    assert nothing.source.tolist() == [] and nothing.counts.tolist() == [0, 0, 0]


def test_arrivals_agree_with_sorting_what_each_rank_chose():
    torch.manual_seed(0)
    W, n, per_rank = 3, 4, 50
    chosen = torch.randint(0, W * n, (W, per_rank))
    table = torch.stack([sort_by_expert(c[:, None], W * n).counts for c in chosen])
    for r in range(W):  # what arrives at rank r, from rank to rank, each sorted by expert
        sent = torch.cat([c.sort(stable=True).values for c in chosen.unbind()])
        here = sent[(sent // n) == r]
        arriving = table[:, r * n:(r + 1) * n]
        to = arrivals(arriving, int(arriving.sum()))
        assert torch.equal(here[to.source], here.sort(stable=True).values)


@pytest.mark.parametrize(("shape", "ranks", "shards", "dim"), [
    ((8, 24, 16), 2, 2, None), ((8, 24, 16), 4, 4, 1), ((8, 24), 4, 4, 1), ((6, 24, 16), 2, 2, 1)])
def test_whole_experts_are_sharded_where_they_divide(shape, ranks, shards, dim):
    found = split_dim(torch.empty(shape), ranks, shards)
    assert (found and found.dim) == dim


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="neither 3 experts of a rank nor 10 rows divide by 4"):
        split_dim(torch.empty(6, 10, 16), 2, 4)


def test_stacked_matrices_are_drawn_one_by_one_with_the_numbers_of_the_stack():
    torch.manual_seed(0)
    plain = torch.empty(5, 4, 12).normal_(std=0.3)  # 48 numbers a matrix: a multiple of 16
    torch.manual_seed(0)
    with WholeDraws():
        drawn = torch.empty(5, 4, 12).normal_(std=0.3)
    assert torch.equal(drawn, plain)


class Stack:
    "As much of a DTensor as tells which matrices are here."

    def __init__(self, n: int, coordinates: tuple, sizes: tuple, *placements):
        self.n, self.placements, self.device_mesh = n, placements, self
        self.coordinates, self.sizes = coordinates, sizes

    def __len__(self):
        return self.n

    def size(self, i):
        return self.sizes[i]

    def get_local_rank(self, i):
        return self.coordinates[i]


@pytest.mark.parametrize(("stack", "here"), [
    (Stack(8, (1, 3), (2, 4), Shard(1), Shard(0)), [6, 7]),
    (Stack(8, (1, 3), (2, 4), _StridedShard(0, split_factor=4), Shard(0)), [7]),
    (Stack(3, (3,), (4,), Shard(0)), []),
    (Stack(3, (1, 0), (2, 4), Replicate(), Shard(0)), [0])])
def test_which_matrices_of_a_stack_are_here(stack, here):
    assert list(own_range(stack, stack.n)) == here
    assert own_rows(stack, torch.arange(stack.n)).tolist() == here


class Mesh:
    "As much of a DeviceMesh as is looked at before anything is shared."

    def size(self) -> int:
        return 3


def test_impossible_numbers_are_refused_in_one_line():
    with pytest.raises(ValueError, match="experts=3: this model has no experts; set experts=1"):
        share_experts(nn.Linear(2, 2), Mesh())
    with pytest.raises(ValueError, match="experts=3 does not divide the 4 experts of a layer"):
        share_experts(nn.ModuleList([Experts(4, 8, 8)]), Mesh())
    with pytest.raises(ValueError, match="strategy='ddp' copies the model"):
        ParallelConfig(strategy="ddp", experts=2)
    with pytest.raises(ValueError, match="experts=2 and tensor=2 do not go together"):
        ParallelConfig(experts=2, tensor=2)
    with pytest.raises(ValueError, match="times tensor=1 times experts=4; start another number"):
        ParallelConfig(experts=4).data_ranks(0, 6)
    assert ParallelConfig(experts=4).data_ranks(3, 8) == (3, 8)  # each has tokens of its own


def test_a_subclass_keeps_its_biases_and_its_activation(two):
    assert max(two.run(clamped)) < 2e-6


# --- plans ---


def sparse_run(**parallel) -> RunConfig:
    sizes = {"vocab_size": 500, "n_layers": 2, "d_model": 64, "d_head": 16, "d_ff": 64,
             "n_experts": 16, "top_k": 2}
    return RunConfig(
        data="-", preset="mixtral-test", model=sizes,
        loader=LoaderConfig(batch_size=8, seq_len=64),
        parallel=ParallelConfig(reshard=True, **parallel),
        train=TrainConfig(dtype="float32", device="cpu"))


def fake(config: RunConfig, n: int) -> dict:
    return simulate(plain_run(config, True), n, True)


def test_a_plan_gathers_only_the_experts_of_a_rank():
    gathered = {}
    for experts in (1, 2, 8):
        sizes = fake(sparse_run(experts=experts), 8)["sizes"]
        gathered[experts] = sizes["gathered"]
        whole = 4 * count_parameters(model_config(sparse_run()))
        assert sizes["parameters"] == pytest.approx(whole / 8, rel=0.05)  # as before
        assert sizes["gradients"] == pytest.approx(whole / 8, rel=0.05)
    assert gathered[8] < 0.75 * gathered[2] < 0.75 * gathered[1]


def test_a_plan_names_the_mesh():
    plan = make_plan(sparse_run(experts=4), 8, "h100")
    assert mesh_of(plan) == "fsdp 8 (ep 4)"
    with pytest.raises(ValueError, match="experts=3 does not divide the 16 experts"):
        make_plan(replace(sparse_run(), parallel=ParallelConfig(experts=3),
                          loader=LoaderConfig(batch_size=6, seq_len=64)), 6, "h100")


def test_sharing_experts_is_a_remedy():
    shared = with_experts(sparse_run(), 8)
    assert shared.parallel.experts == 8
    assert with_experts(sparse_run(), 32).parallel.experts == 16  # and two ranks split rows
    assert with_experts(sparse_run(), 48) is None  # three ranks can split neither
    assert with_experts(sparse_run(experts=2), 8) is None
    assert with_experts(replace(sparse_run(), preset="test", model={}), 8) is None
    texts = [text for text, *_ in remedies(make_plan(sparse_run(), 8, "h100"))]
    assert "--parallel.recompute true --parallel.experts 8" in texts


def test_dense_blocks_at_the_beginning_are_simulated_and_equal_ones_are_not():
    small = {"n_layers": 9, "first_dense": 2, "vocab_size": 500}
    config = replace(sparse_run(experts=2), preset="deepseek-test", model=small)
    blocks = blocks_of(config)
    assert repeats(blocks) == (2, 1) and repeats(blocks[:2]) == (0, 1)
    line, whole = simulate_any_depth(config, 4, True), fake(config, 4)
    assert peak(line) == pytest.approx(peak(whole), rel=1e-3)
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        assert line["sizes"][kind] == pytest.approx(whole["sizes"][kind], rel=1e-3)


def peak(memory: dict) -> float:
    return max(sum(kinds.values()) for kinds in memory["phases"].values())


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "gpus"), [("mixtral-8x7b", 16), ("deepseek-v3", 512)])
def test_a_plan_of_a_published_model(preset, gpus):
    "With its experts shared it needs less, and nothing of it was run."
    config = RunConfig(data="-", preset=preset, loader=LoaderConfig(batch_size=gpus, seq_len=4096),
                       parallel=ParallelConfig(recompute=True, gather_dtype="bfloat16"))
    shared = make_plan(with_experts(config, gpus), gpus, "h200")
    sizes = shared.memory["sizes"]
    layer = max(3 * b.ffn.router.n_experts * b.ffn.d_ff * model_config(config).d_model * 2
                for b in blocks_of(config) if hasattr(b.ffn, "router"))  # bytes in bf16
    assert sizes["gathered"] < layer  # less than one layer of all experts
