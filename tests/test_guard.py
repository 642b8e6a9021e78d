"""NaN, infinity, loss spikes: what is skipped, what is written down, where a run goes back to."""

import json
from pathlib import Path

import pytest
import torch
from byte_corpus import corpus, write
from faulty import Faulty
from guard_worker import make_trainer, weights_hash
from ranks import launch

from skylar.training.guard import Guard, GuardConfig, LossSpikes
from skylar.training.loss import LOSSES
from skylar.training.metrics import CLOCK_FIELDS, read_metrics

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "data"
    write(corpus(), folder)
    return folder


def anomalies(out: Path) -> list[dict]:
    path = out / "anomalies.jsonl"
    return [json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
            for line in path.read_text().splitlines()] if path.exists() else []


# --- one bad batch ---


@pytest.mark.parametrize(("factor", "text"), [(NAN, "nan"), (INF, "inf")])
def test_a_bad_batch_is_skipped_and_named(data, tmp_path, factor, text):
    before = {}

    def look(row):
        before[row["step"]] = weights_hash(t.model)

    t = make_trainer(data, tmp_path, bad=(20, 24), factor=factor, callbacks=[look])
    rows = t.train()
    assert before[5] == before[6] != before[7]  # samples 20 to 23 are those of step 6
    assert [r["skipped"] for r in rows] == [0] * 5 + [1] * 15
    (row,) = anomalies(tmp_path)
    assert (row["step"], row["event"], row["cause"]) == (6, "skipped", "loss")
    assert row["loss"] == text and row["n_parameters"] == len(list(t.model.parameters()))
    assert row["micro_batches"] == [
        {"rank": 0, "micro_batch": 0, "loss": text, "samples": [20, 23]}]


def test_the_bad_micro_batch_of_several_is_the_one_that_is_named(data, tmp_path):
    t = make_trainer(data, tmp_path, bad=(28, 32), grad_accum_steps=4, steps=5, log_every=5)
    t.train()  # one look at the end, at five steps
    (row,) = anomalies(tmp_path)
    assert row["step"] == 2
    assert [b["micro_batch"] for b in row["micro_batches"]] == [3]
    assert row["micro_batches"][0]["samples"] == [28, 31]


class OneGradient(Faulty):
    "The loss is finite; where the batch is marked, the gradient of one parameter is NaN."

    def __init__(self, model):
        super().__init__(model)
        self.factor = torch.tensor(1.0)
        model.model.norm.weight.register_hook(lambda grad: grad * self.factor)

    def forward(self, batch):
        self.factor = batch["factor"][0]
        return super().forward(batch | {"factor": torch.ones_like(batch["factor"])})


def test_a_nan_in_one_gradient_names_its_parameter(data, tmp_path):
    t = make_trainer(data, tmp_path, bad=(20, 24), objective=OneGradient)
    t.train()
    (row,) = anomalies(tmp_path)
    assert row["cause"] == "gradient" and isinstance(row["loss"], float)
    assert row["parameters"] == ["model.model.norm.weight"] and row["n_parameters"] == 1
    assert row["grad_norm"] == "nan"


def test_metrics_of_a_bad_batch_do_not_spoil_the_row(data, tmp_path):
    class WithMetric(Faulty):
        def forward(self, batch):
            out = super().forward(batch)
            return out._replace(metrics={"extra": (out.loss_sum, out.n_valid)})

    t = make_trainer(data, tmp_path, bad=(20, 24), objective=WithMetric, log_every=4)
    rows = t.train()
    assert all(isinstance(r["extra"], float) and r["extra"] == pytest.approx(r["loss"])
               for r in rows)


def test_a_run_without_a_bad_step_writes_nothing(data, tmp_path):
    make_trainer(data, tmp_path).train()
    assert not (tmp_path / "anomalies.jsonl").exists()


# --- too many in a row ---


def test_the_guards_own_limit_comes_before_the_trainers(data):
    with pytest.raises(ValueError, match="not finite 2 times in a row, up to step 7"):
        make_trainer(data, bad=(20, 60), guard=GuardConfig(max_nonfinite_steps=2)).train()
    with pytest.raises(ValueError, match="not finite 4 times in a row, up to step 9"):
        make_trainer(data, bad=(20, 60), max_nonfinite_steps=4).train()


def test_a_roll_back_leaves_the_data_out_and_draws_other_numbers(data, tmp_path):
    draws = {}

    def look(row):
        draws.setdefault(row["step"], []).append(torch.get_rng_state().sum().item())

    t = make_trainer(data, tmp_path, bad=(40, 60), dropout=0.1, callbacks=[look],
                     guard=GuardConfig(max_nonfinite_steps=3, rollback=1))
    rows = t.train()
    # steps 11, 12, 13 are bad; the checkpoint before them is that of step 8
    assert [r["step"] for r in rows] == list(range(1, 21)) and t.progress.step == 20
    assert [r["event"] for r in anomalies(tmp_path)[:4]] == ["skipped"] * 3 + ["rollback"]
    back = anomalies(tmp_path)[3]
    assert (back["step"], back["to_step"], back["loader"]) == (13, 8, 52)
    # samples 52 to 59 are bad, too: two steps skipped on the way, not three
    assert [r["step"] for r in anomalies(tmp_path)[4:]] == [9, 10]
    assert rows[-1]["rollbacks"] == 1 and rows[-1]["skipped"] == 2
    assert t.loader.sample_index == 52 + 12 * 4
    assert len(draws[9]) == 2 and draws[9][0] != draws[9][1]  # the same weights, other dropout
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_nan_weights_are_healed_by_the_roll_back(data, tmp_path):
    def spoil(row):
        if row["step"] == 6 and not t.train_step.guard.rollbacks:
            with torch.no_grad():
                t.model.lm_head.weight[3, 3] = NAN

    t = make_trainer(data, tmp_path, callbacks=[spoil],
                     guard=GuardConfig(max_nonfinite_steps=2, rollback=1))
    rows = t.train()
    assert all(p.isfinite().all() for p in t.model.parameters())
    assert rows[-1]["step"] == 20 and rows[-1]["loss"] < rows[0]["loss"]
    assert [r["step"] for r in anomalies(tmp_path)] == [7, 8, 8]


def test_a_checkpoint_saved_among_bad_steps_is_not_gone_back_to(data, tmp_path):
    t = make_trainer(data, tmp_path, bad=(40, 60), save_every=1, keep_last=0,
                     guard=GuardConfig(max_nonfinite_steps=3, rollback=1))
    t.train()  # bad from step 11 on; checkpoints of steps 11 and 12 exist when it is noticed
    assert [r["to_step"] for r in anomalies(tmp_path) if r["event"] == "rollback"] == [10]


def test_after_the_last_roll_back_it_stops_with_one_line(data, tmp_path):
    t = make_trainer(data, tmp_path, bad=(40, 10_000),
                     guard=GuardConfig(max_nonfinite_steps=3, rollback=2))
    with pytest.raises(ValueError, match=r"not finite 3 times in a row, up to step 11 "
                                         r"\(after 2 roll-backs\): lower"):
        t.train()
    assert sum(r["event"] == "rollback" for r in anomalies(tmp_path)) == 2


def test_without_a_checkpoint_from_before_it_stops(data, tmp_path):
    t = make_trainer(data, tmp_path, bad=(4, 10_000), guard=GuardConfig(rollback=1))
    with pytest.raises(ValueError, match="5 times in a row, up to step 6: lower"):
        t.train()


def test_roll_backs_need_checkpoints(data, tmp_path):
    for out, save_every in ((None, 4), (tmp_path, 0)):
        with pytest.raises(ValueError, match="rollback=1 needs checkpoints"):
            make_trainer(data, out, guard=GuardConfig(rollback=1), save_every=save_every)


@pytest.mark.parametrize("bad", [dict(rollback=-1), dict(spike_factor=1.0), dict(spike_window=1),
                                 dict(spike_factor=NAN), dict(max_nonfinite_steps=0)])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GuardConfig(**bad)


class Killed(BaseException):
    "SIGKILL, as far as files are concerned."


@pytest.mark.parametrize("at", [10, 12, 15, 18])
def test_killed_around_a_roll_back_it_ends_at_the_same_weights(data, tmp_path, at):
    def run(out, callbacks=(), resume=False):
        t = make_trainer(data, out, bad=(40, 60), dropout=0.1, callbacks=callbacks,
                         guard=GuardConfig(max_nonfinite_steps=3, rollback=1, spike_factor=3.0,
                                           spike_window=4))
        t.train(resume=resume)
        return weights_hash(t.model), read_metrics(out / "metrics.jsonl"), anomalies(out)

    def strip(rows):
        return [{k: v for k, v in r.items() if k not in CLOCK_FIELDS} for r in rows]

    seen = []

    def kill(row):
        seen.append(row["step"])
        if len(seen) == at:
            raise Killed

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", [kill])
    again = run(tmp_path / "killed", resume=True)
    assert again[0] == whole[0] and again[2] == whole[2]
    assert strip(again[1]) == strip(whole[1])


# --- loss spikes ---


def test_a_spike_is_skipped_only_if_asked_for(data, tmp_path):
    def run(out, guard):
        hashes = {}

        def look(row):
            hashes[row["step"]] = weights_hash(t.model)

        t = make_trainer(data, out, bad=(48, 52), factor=4.0, guard=guard, callbacks=[look])
        return t.train(), hashes

    rows, hashes = run(tmp_path / "off", None)
    assert hashes[12] != hashes[13] and "spikes" not in rows[-1]
    assert anomalies(tmp_path / "off") == []
    rows, hashes = run(tmp_path / "on", GuardConfig(spike_factor=2.0, spike_window=8))
    assert hashes[12] == hashes[13] != hashes[14]
    assert rows[-1]["spikes"] == 1 and rows[-1]["skipped"] == 0
    assert rows[12]["loss"] > 2 * rows[11]["loss"]  # it is not hidden
    (row,) = anomalies(tmp_path / "on")
    assert row["cause"] == "loss spike" and row["loss"] > 2 * row["median"] > 0
    assert row["micro_batches"][0]["samples"] == [48, 51]


def test_the_median_is_torchs_and_waits_for_a_full_window():
    torch.manual_seed(0)
    rule, values = LossSpikes(1.5, 5, torch.device("cpu")), torch.rand(40) + 0.5
    for i, value in enumerate(values):
        spike, median = rule.add(value, torch.tensor(True))
        if i < 5:
            assert not spike and median.isnan()
        else:
            assert median == values[i - 5:i].median()
            assert spike == (value > 1.5 * median)
    assert 0 < int(rule.count) < 35


def test_nothing_is_read_from_the_device_until_a_row_is_written(data, monkeypatch):
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(Guard, "look", lambda self: reads.append(1))
    t = make_trainer(data, guard=GuardConfig(spike_factor=2.0, spike_window=4), log_every=10,
                     save_every=0)

    def refuse(self):
        raise AssertionError("the host waits for the device")

    t.objective.loss = LOSSES["plain"]  # the fused one looks at a number, on a CPU only
    step, batches = t.train_step, iter(t.loader)
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for i in range(8):
        step(batches, i)
    monkeypatch.undo()
    assert real is torch.Tensor.item and not reads and len(step.guard.records) == 8


# --- several processes ---


WORKER = Path(__file__).with_name("guard_worker.py")
IDS = dict(ids=str)


def run_ranks(folder: Path, n: int, **settings) -> dict:
    "What a process saw, once it is known that all saw the same."
    folder.mkdir(exist_ok=True)
    launch(n, WORKER, folder, json.dumps(settings))
    found = json.loads((folder / "result.json").read_text())
    assert len(found) == n and all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_agree_when_one_of_them_meets_a_bad_batch(tmp_path, strategy):
    found = run_ranks(tmp_path / "one", 2, strategy=strategy)
    check_bad_batch(found, tmp_path / "one", 1, first_sample=2, last_sample=3)
    assert run_ranks(tmp_path / "two", 2, strategy=strategy) == found  # bit for bit


@pytest.mark.parametrize(("n", "settings", "samples"), [
    (4, {"replicas": 2}, (3, 3)), (2, {"tensor": 2}, (0, 3)), (4, {"tensor": 2}, (2, 3))], **IDS)
def test_ranks_agree_when_one_of_them_meets_a_bad_batch(tmp_path, n, settings, samples):
    "The last process alone: with tensor=2, its partner has the same batch without a fault."
    found = run_ranks(tmp_path / "one", n, **settings)
    check_bad_batch(found, tmp_path / "one", n - 1, *samples)


def check_bad_batch(found: dict, folder: Path, rank: int, first_sample: int, last_sample: int):
    assert found["rollbacks"] == 1 and found["step"] == 20
    assert found["kept"] == [True] * 8 + [False] * 3 + [True] * 12  # 20 steps, three again
    rows = anomalies(folder / "run")
    assert [r["event"] for r in rows] == ["skipped"] * 3 + ["rollback"]
    for row, sample in zip(rows, (32, 36, 40)):
        assert row["micro_batches"] == [{"rank": rank, "micro_batch": 0, "loss": "nan",
                                         "samples": [sample + first_sample, sample + last_sample]}]
    assert rows[3]["to_step"] == 8


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_that_share_matrices_agree_about_a_gradient_of_one_of_them(tmp_path, n):
    """Of a norm that both have, so that no sum over ranks tells the other one of it."""
    found = run_ranks(tmp_path / "one", n, tensor=2, kind="gradient")
    assert found["kept"] == [True] * 8 + [False] * 3 + [True] * 12 and found["rollbacks"] == 1
    rows = anomalies(tmp_path / "one/run")
    assert [r["cause"] for r in rows[:3]] == ["gradient"] * 3
    assert all(r["parameters"] == ["model.model.norm.weight"] for r in rows[:3])


@pytest.mark.parametrize(("n", "settings"), [
    (2, {"strategy": "ddp"}), (4, {"replicas": 2}), (2, {"tensor": 2})], **IDS)
def test_ranks_agree_when_one_of_them_sees_a_spike(tmp_path, n, settings):
    found = run_ranks(tmp_path / "one", n, kind="spike", **settings)
    assert found["kept"] == [step != 13 for step in range(1, 21)]
    assert found["hash"][11] == found["hash"][12] != found["hash"][13]  # samples 48 to 51
    assert found["spikes"] == 1 and found["rollbacks"] == 0
    (row,) = anomalies(tmp_path / "one/run")
    assert (row["step"], row["cause"]) == (13, "loss spike")




def test_a_parameter_that_is_idle_on_one_rank_or_on_both(tmp_path):
    done = launch(2, Path(__file__).with_name("idle_worker.py"), tmp_path)
    first, second = json.loads((tmp_path / "idle.json").read_text())
    assert first == second
    one, two, three, four = first["head"]  # used at steps 2 and 4
    assert one != two == three != four
    assert "find_unused" not in done.stderr
