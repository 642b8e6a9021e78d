"""Several processes train the model that one process trains: losses, norms and weights."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import launch

from skylar.training.distributed import ParallelConfig, frees_blocks, joins_blocks, recompute
from skylar.training.metrics import CLOCK_FIELDS
from skylar.training.trainer import check_ranks
from skylar.utils.processes import Ranks, place

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(n: int, *command, check: bool = True, options=()) -> subprocess.CompletedProcess:
    "As `ranks.launch`, by torchrun itself."
    start = [] if n == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={n}", *options,
                               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run([sys.executable, *start, *map(str, command)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def train(folder: Path, n: int, family: str = "qwen3", **settings) -> dict:
    out = folder / "result.pt"
    launch(n, WORKER, out, family, json.dumps(settings))
    return torch.load(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return train(tmp_path_factory.mktemp("alone"), 1)


def test_tensor_parallel_with_biases_and_learned_positions(tmp_path):
    alone, split = train(tmp_path, 1, "gpt2"), train(tmp_path, 2, "gpt2", tensor=2)
    for ours, theirs in zip(split["rows"], alone["rows"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)


@pytest.mark.parametrize(("n", "settings"), [
    (1, {"recompute": True}),
    (2, {"strategy": "ddp"}),
    (2, {"strategy": "fsdp"}),
    (2, {"strategy": "fsdp", "recompute": True}),
    (2, {"strategy": "fsdp", "reshard": False}),
    (2, {"strategy": "fsdp", "reshard": True, "recompute": True}),
    (2, {"tensor": 2}),
    (4, {"replicas": 2}),
    (4, {"tensor": 2}),
], ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v))
def test_the_same_run_as_alone_at_unequal_target_counts(alone, tmp_path, n, settings):
    found = train(tmp_path, n, **settings)
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=2e-4, rtol=0)
        assert (weight - alone["start"][name]).abs().max() > 5e-3  # far more than the bound


def test_recomputed_blocks_are_copied_with_their_own_weights_and_only_once():
    from skylar.models.decoder import CausalLM
    from skylar.models.presets import get_config

    model = CausalLM(get_config("test", vocab_size=50, n_layers=1))
    names, block = list(model.state_dict()), model.model.layers[0]
    recompute(block)
    kind = type(block)
    recompute(block)
    assert type(block) is kind and list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    x = torch.randn(1, 4, model.config.d_model)
    before = twin.model.layers[0](x)
    torch.nn.init.zeros_(block.mlp.down_proj.weight)
    torch.testing.assert_close(twin.model.layers[0](x), before, atol=0, rtol=0)


def test_a_loader_of_another_rank_is_refused():
    loader = type("Loader", (list,), {"rank": 0, "world_size": 2})([{"x": torch.ones(1)}])
    with pytest.raises(ValueError, match="rank=0, world_size=2, and this is rank 0 of 1"):
        check_ranks(loader, Ranks())


def test_an_objective_on_meta_that_cannot_be_given_numbers_is_refused():
    with torch.device("meta"):
        head = torch.nn.Module()
        head.model, head.scale = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="scale.weight is on meta, and Module has no init_weights"):
        place(head, torch.device("cpu"), 0)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 processes do not divide by replicas=1 times tensor=2"):
        ParallelConfig(tensor=2).data_ranks(0, 3)
    with pytest.raises(ValueError, match="strategy='ddp' copies the model"):
        ParallelConfig(strategy="ddp", tensor=2)


STEPS = ["--train.steps", "12", "--train.save_every", "6"]


def pretrain_words(folder: Path, home: Path) -> list[str]:
    "The words after `skylar` that train a tiny model in `folder`, on data in `home`."
    text = home / "text.txt"
    if not text.exists():
        words = ["the", "king", "queen", "of", "night", "and", "day", "who", "comes", "here"]
        documents = (" ".join(words[i * j % 10] for j in range(1, 60)) for i in range(200))
        text.write_text("\n\n".join(documents))
    return ["pretrain", "--data", str(home / "data"), "--corpus.source", str(text),
            "--corpus.vocab_size", "270", "--out", str(folder), "--model.n_layers", "1",
            "--loader.seq_len", "16", "--loader.batch_size", "12", "--train.dtype", "float32",
            "--train.log_every", "3", "--train.eval_every", "6", "--optimizer.lr", "1e-3", *STEPS]


def pretrain(n: int, folder: Path, *flags, start=("-m", "skylar"), options=(),
             check: bool = True) -> subprocess.CompletedProcess:
    "`skylar pretrain` of a tiny model in `folder`, in `n` processes."
    words = [*start, *pretrain_words(folder, folder.parent), *flags]
    if options:
        return torchrun(n, *words, check=check, options=options)
    return launch(n, *words, check=check)


def numbers(folder: Path) -> list[dict]:
    "The rows of metrics, without what depends on the clock."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


def test_a_run_goes_on_at_another_number_of_processes(tmp_path):
    pretrain(1, tmp_path / "alone")
    pretrain(2, tmp_path / "two")
    alone = numbers(tmp_path / "alone")
    assert len(alone) == 4 and alone[-1]["loss"] < alone[0]["loss"]
    assert numbers(tmp_path / "two") == [pytest.approx(row, abs=2e-5) for row in alone]
    for n in (1, 3):  # from the two processes' checkpoint in the middle
        out = tmp_path / f"then_{n}"
        shutil.copytree(tmp_path / "two", out)
        shutil.rmtree(out / "checkpoints" / "step-000012")
        (out / "checkpoints" / "latest").write_text("step-000006\n")
        pretrain(n, out, "--resume")
        assert numbers(out) == [pytest.approx(row, abs=2e-5) for row in alone]


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    failed = pretrain(2, tmp_path / "odd", "--loader.batch_size", "7", check=False)
    assert failed.returncode != 0 and "does not divide among 2 processes" in failed.stderr
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("reshard, numel, freed", [
    (None, 2**26, False), (None, 2**26 + 1, True), (False, 2**27, False), (True, 1, True)])
def test_small_models_keep_gathered_blocks(reshard, numel, freed):
    block = torch.nn.Linear(numel, 1, bias=False, device="meta")
    assert frees_blocks(ParallelConfig(reshard=reshard), block) is freed


@pytest.mark.parametrize("settings, numel, joined", [
    ({}, 2**24, True), ({}, 2**24 + 1, False), ({"reshard": False}, 1, False),
    ({"reshard": True}, 1, False), ({"gather_dtype": "bfloat16"}, 1, False)])
def test_small_models_travel_in_one_message(settings, numel, joined):
    block = torch.nn.Linear(numel, 1, bias=False, device="meta")
    assert joins_blocks(ParallelConfig(**settings), block) is joined
