"""What lesson 17 says about sharded heads, bf16 gathers, split matrices and its processes.

Two processes of one thread, started once for all tests of this file (`Workers`); the functions
that they run are sent as source, so each uses only its arguments and SETUP.
"""

import pytest
import torch

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.utils.lesson import Workers

SETUP = """
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import LOSSES, NextTokenObjective
dist.init_process_group("gloo")
"""
V, T = 64, 12


def objective_of(tied=True, loss="fused"):
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_ff=48, n_layers=2)
    config = get_config("test", vocab_size=64, tie_embeddings=tied, dropout=0.0, **sizes)
    options = {"chunk": 8} if loss == "fused" else {}  # several chunks
    return NextTokenObjective(CausalLM(config), loss, z_loss=1e-2, softcap=10.0, **options)


def micro_batches(n=3):
    "Row 0 has few targets, row 3 all."
    generator, made = torch.Generator().manual_seed(1), []
    for _ in range(n):
        ids = torch.randint(0, V, (4, T + 1), generator=generator)
        masked = torch.rand(4, T, generator=generator) >= torch.linspace(0.1, 1, 4)[:, None]
        made.append({"input_ids": ids[:, :-1], "labels": ids[:, 1:].masked_fill(masked, -100)})
    return made


def weighted_gradients(batches, upstream, tied, loss, settings):
    "Gradients of sum(upstream[rank][i] * summed loss of micro-batch i), added over ranks."
    rank, size = dist.get_rank(), dist.get_world_size()  # noqa: F821
    objective = objective_of(tied, loss)
    run = ParallelConfig(**settings).apply(objective, torch.device("cpu"), 0)
    for i, batch in enumerate(batches):
        run.sync_gradients(i == len(batches) - 1)
        part = {k: v.chunk(size)[rank].contiguous() for k, v in batch.items()}
        (upstream[rank][i] * run.forward(part).loss_sum).backward()
    whole = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad  # noqa: F821
             for n, p in objective.named_parameters()}
    return {n: size * g for n, g in whole.items()}


@pytest.fixture(scope="module")
def two():
    workers = Workers(2, SETUP)
    workers.define(objective_of)
    yield workers
    workers.close()


@pytest.mark.parametrize("settings", [{}, {"reshard": True}, {"strategy": "ddp"}], ids=str)
@pytest.mark.parametrize(("tied", "loss"), [(True, "fused"), (False, "fused"), (False, "plain")])
def test_a_sharded_head_under_non_uniform_upstream_gradients(two, tied, loss, settings):
    """The head's weight is a sharded DTensor outside of forward; and Liger once scaled all
    gradients by the first upstream one."""
    batches, upstream = micro_batches(), [[0.3, -2.5, 1.0], [4.0, 0.0, 0.7]]
    alone = objective_of(tied, loss)
    for i, batch in enumerate(batches):
        for rank in range(2):
            part = {k: v.chunk(2)[rank] for k, v in batch.items()}
            (upstream[rank][i] * alone(part).loss_sum).backward()
    found = two.run(weighted_gradients, batches, upstream, tied, loss, settings)
    for grads in found:
        for name, p in alone.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, atol=2e-5, rtol=1e-5)
    assert alone.model.lm_head.weight.grad.norm() > 1


def loss_of_a_sharded_weight(name):
    run = ParallelConfig().apply(objective_of(False), torch.device("cpu"), 0)
    weight = run.objective.model.lm_head.weight
    assert isinstance(weight, DTensor) and len(weight.to_local()) == 32  # noqa: F821
    try:
        LOSSES[name](torch.randn(5, 32), weight, torch.arange(5))  # noqa: F821
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["fused", "plain"])
def test_the_loss_of_a_sharded_weight_outside_of_forward_is_refused_not_computed(two, name):
    errors = two.run(loss_of_a_sharded_weight, name)
    assert all("a shard of 2 processes" in error for error in errors)


def bf16_step(batch, cast):
    run = ParallelConfig(gather_dtype="bfloat16").apply(objective_of(), torch.device("cpu"), 0)
    block, seen = run.objective.model.model.layers[0], []
    block.mlp.register_forward_hook(lambda m, *_: seen.append(
        (m.up_proj.weight.dtype, run.objective.model.lm_head.weight.dtype)))
    rank, size = dist.get_rank(), dist.get_world_size()  # noqa: F821
    part = {k: v.chunk(size)[rank].contiguous() for k, v in batch.items()}
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            output = run.forward(part)
    except ValueError as error:
        return str(error)
    output.loss_sum.backward()
    kinds = {p.dtype for p in run.objective.parameters()}
    kinds |= {p.grad.dtype for p in run.objective.parameters()}
    total = output.loss_sum.detach().clone()
    dist.all_reduce(total)  # noqa: F821
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.objective.parameters()])
    return seen, kinds, total.item(), (size * norm.full_tensor()).item()


def test_gathers_in_bf16_are_as_autocast_on_one_process_and_shards_stay_float32(two):
    batch, alone = micro_batches(1)[0], objective_of()
    with torch.autocast("cpu", torch.bfloat16):
        loss = alone(batch).loss_sum
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters()]).item()
    seen, kinds, total, sharded_norm = two.run(bf16_step, batch, True)[0]
    assert seen == [(torch.bfloat16, torch.float32)] and kinds == {torch.float32}
    assert total == pytest.approx(loss.item(), rel=1e-3)
    assert sharded_norm == pytest.approx(norm, rel=1e-2)


def test_gathers_in_bf16_need_autocast_and_shards(two):
    errors = two.run(bf16_step, micro_batches(1)[0], False)
    assert all("train.dtype='bfloat16'" in error for error in errors)
    with pytest.raises(ValueError, match="gather_dtype is for strategy='fsdp'"):
        ParallelConfig(strategy="ddp", gather_dtype="bfloat16")
    with pytest.raises(ValueError, match="float16"):
        ParallelConfig(gather_dtype="float16")


def all_reduces(batch):
    run = ParallelConfig(tensor=2).apply(objective_of(), torch.device("cpu"), 0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:  # noqa: F821
        run.forward(batch).loss_sum.backward()
    return sum(e.count for e in seen.key_averages() if e.key == "gloo:all_reduce")


def test_split_matrices_need_one_all_reduce_for_each_half_of_a_block_and_direction(two):
    assert two.run(all_reduces, micro_batches(1)[0]) == [2 * 4, 2 * 4]  # two blocks


@pytest.mark.parametrize("more", [{}, {"reshard": True}], ids=["in one message", "by block"])
def test_compiled_block_by_block_under_fsdp(two, more):
    batches, upstream = micro_batches(1), [[1.0], [1.0]]
    arguments = batches, upstream, True, "fused"
    plain = two.run(weighted_gradients, *arguments, more)[0]
    compiled = two.run(weighted_gradients, *arguments, {"compile_blocks": True, **more})[0]
    for name, grad in plain.items():
        torch.testing.assert_close(compiled[name], grad, atol=1e-4, rtol=1e-4)


def rank_times(x):
    print("rank", dist.get_rank())  # noqa: F821
    return x * dist.get_rank()  # noqa: F821


def fail_on_one():
    if dist.get_rank() == 1:  # noqa: F821
        raise ValueError("rank 1 has no data")
    dist.barrier()  # noqa: F821


def end_process():
    import os
    os._exit(3)


def test_workers_answer_in_order_of_rank(two, capsys):
    assert two.run(rank_times, 7) == [0, 7]
    assert capsys.readouterr().out == "[0] rank 0\n[1] rank 1\n"


@pytest.mark.parametrize(("function", "said"), [
    (fail_on_one, "rank 1: .*no data"), (end_process, "the process has ended with exit code 3")])
def test_a_worker_that_fails_ends_the_others_which_would_wait(function, said):
    workers = Workers(2, SETUP)
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        workers.run(function)
    with pytest.raises(RuntimeError, match="start new ones"):
        workers.run(function)
    workers.close()
