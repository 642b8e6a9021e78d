"""The Trainer: what divides the loss, what is written down, what stops it."""

import json
import math
import signal
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skylar.training.evaluate import evaluate
from skylar.training.metrics import read_metrics
from skylar.training.objective import LossOutput
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import StopSignals, TrainConfig, Trainer
from skylar.utils.devices import has_bfloat16, pick_dtype

V, D = 11, 8


class Bigram(nn.Module):
    """A table from a token to the logits of the next."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, D)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(D, V)

    def forward(self, ids):
        return self.head(self.drop(self.table(ids)))


class NextToken(nn.Module):
    """Summed cross-entropy of the next token, with a metric of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        logits, labels = self.model(batch["input_ids"]), batch["labels"]
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        n = (labels != -100).sum()
        right = (logits.argmax(-1) == labels).sum()
        return LossOutput(loss, n, {"accuracy": (right, n)})


def batch(rows=4, seed=0, masked=0.0):
    g = torch.Generator().manual_seed(seed)
    window = torch.randint(V, (rows, 9), generator=g)
    labels = window[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=g) < masked] = -100
    return {"input_ids": window[:, :-1], "labels": labels}


def config(**changes):
    return TrainConfig(**{"steps": 4, "dtype": "float32", "device": "cpu", **changes})


def trainer(loader, *, model=None, quiet=True, lr=1e-2, **options):
    settings = options.pop("config", None) or config()
    objective = options.pop("objective", NextToken)(model or Bigram())
    return Trainer(objective, loader, settings, quiet=quiet,
                   optimizer=AdamWConfig(lr=lr), schedule=ScheduleConfig(kind="constant",
                                                                         warmup_steps=0), **options)


def weights(t):
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


@pytest.mark.parametrize("masked", [0.0, 0.7])
@pytest.mark.parametrize("k", [2, 4])
def test_accumulation_equals_one_big_batch(k, masked):
    big = batch(rows=8, masked=masked)
    small = [{n: part for n, part in zip(big, parts)}
             for parts in zip(*(t.chunk(k) for t in big.values()))]
    one = trainer([big])
    many = trainer(small, config=config(grad_accum_steps=k))
    one.train(), many.train()
    torch.testing.assert_close(weights(many), weights(one), rtol=0, atol=1e-6)
    assert many.metrics.rows[-1]["loss"] == pytest.approx(one.metrics.rows[-1]["loss"], abs=1e-6)


def test_one_micro_batch_without_any_target_changes_nothing():
    full, empty = batch(), batch(masked=1.1)
    one, two = trainer([full]), trainer([empty, full], config=config(grad_accum_steps=2))
    one.train(), two.train()
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-6)


def test_equals_the_plain_loop():
    data = [batch(seed=i) for i in range(4)]
    t = trainer(data, config=config(max_grad_norm=0))
    t.train()
    model = Bigram()
    optimizer = AdamWConfig(lr=1e-2).build(model)
    for b in data:
        loss = F.cross_entropy(model(b["input_ids"]).flatten(0, 1), b["labels"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(t), plain, rtol=0, atol=1e-6)


def test_schedule_and_clip_reach_the_optimizer():
    t = trainer([batch()], config=config(max_grad_norm=1e-9, log_every=1))
    t.train_step.schedule = ScheduleConfig(kind="cosine", warmup_steps=1)
    rows = t.train()
    assert [r["lr"] for r in rows] == pytest.approx(
        [1e-2 * t.train_step.schedule.multiplier(i, 4) for i in range(4)])
    assert all(r["grad_norm"] > 1e-3 for r in rows)  # measured before clipping


def test_master_weights_stay_float32_under_bfloat16():
    t = trainer([batch()], config=config(dtype="bfloat16"))
    t.train()
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}
    assert math.isfinite(t.metrics.rows[-1]["loss"])


def test_auto_dtype_follows_the_processor():
    cpu = torch.device("cpu")
    assert (pick_dtype("auto", cpu) == torch.bfloat16) == has_bfloat16(cpu)
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


def test_compiled_objective_gives_the_same_weights():
    plain, compiled = trainer([batch()]), trainer([batch()], config=config(compile=True))
    plain.train(), compiled.train()
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=0, atol=1e-5)


def test_evaluation_is_a_mean_over_targets_and_repeats_itself():
    data = [batch(seed=i, masked=m) for i, m in enumerate((0.0, 0.9))]
    model = Bigram(dropout=0.5).train()
    got = evaluate(NextToken(model), data, bytes_per_token=4.0, dtype="float32")
    assert got == evaluate(NextToken(model), data, bytes_per_token=4.0, dtype="float32")
    assert model.training
    model.eval()
    nats = sum(NextToken(model)(b).loss_sum.item() for b in data)
    mean = nats / sum(int((b["labels"] != -100).sum()) for b in data)
    assert got["val_loss"] == pytest.approx(mean)
    assert got["val_perplexity"] == pytest.approx(math.exp(mean))
    assert got["val_bits_per_byte"] == pytest.approx(mean / math.log(2) / 4)


def test_a_loss_that_is_not_of_tokens_has_no_perplexity():
    objective = NextToken(Bigram())
    objective.nats_per_token = False
    assert {"val_loss"} == {n for n in evaluate(objective, [batch()]) if n != "val_accuracy"}


def test_evaluation_puts_the_loader_back():
    class Loader:
        at = 0

        def __iter__(self):
            while True:
                self.at += 1
                yield batch(seed=self.at)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    loader = Loader()
    first = evaluate(NextToken(Bigram()), loader, 2)
    assert loader.at == 0 and evaluate(NextToken(Bigram()), loader, 2) == first


def test_evaluation_without_targets_is_refused():
    with pytest.raises(ValueError, match="no valid target"):
        evaluate(NextToken(Bigram()), [batch(masked=1.1)])


def test_metrics_file_equals_the_rows(tmp_path):
    seen = []
    t = trainer([batch()], config=config(steps=7, log_every=3, eval_every=5), out_dir=tmp_path,
                eval_loader=[batch(seed=9)], callbacks=[seen.append], bytes_per_token=1.0)
    rows = t.train()
    assert rows == seen == read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [3, 5, 6, 7]
    assert ["val_loss" in r for r in rows] == [False, True, False, True]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "accuracy", "skipped",
            "val_loss", "val_perplexity", "val_bits_per_byte", "val_accuracy"} == set(rows[-1])
    assert rows[-1]["tokens"] == 7 * 32


def test_logged_loss_is_the_mean_since_the_last_row():
    every = trainer([batch(seed=i, masked=0.5) for i in range(4)], config=config(log_every=1))
    once = trainer([batch(seed=i, masked=0.5) for i in range(4)], config=config(log_every=4))
    fine, coarse = every.train(), once.train()
    counts = [int((batch(seed=i, masked=0.5)["labels"] != -100).sum()) for i in range(4)]
    mean = sum(r["loss"] * n for r, n in zip(fine, counts)) / sum(counts)
    assert coarse[0]["loss"] == pytest.approx(mean, rel=1e-6)


class Broken(NextToken):
    """Gives NaN at the training steps named."""

    def __init__(self, model, bad):
        super().__init__(model)
        self.bad, self.calls = bad, 0

    def forward(self, batch):
        output = super().forward(batch)
        self.calls += self.training
        factor = float("nan") if self.calls in self.bad else 1.0
        return output._replace(loss_sum=output.loss_sum * factor)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    t = trainer([batch()], config=config(log_every=1), out_dir=tmp_path,
                objective=lambda model: Broken(model, {2, 3}))
    rows = t.train()
    assert [r["skipped"] for r in rows] == [0, 1, 2, 2]
    assert rows[1]["loss"] is None and rows[1]["grad_norm"] is None
    strict = [json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
              for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert strict == rows
    assert torch.isfinite(weights(t)).all()


def test_many_bad_steps_in_a_row_stop_with_one_clear_line():
    t = trainer([batch()], config=config(steps=20, max_nonfinite_steps=3, log_every=1), lr=0.5,
                objective=lambda model: Broken(model, set(range(5, 20))))
    with pytest.raises(ValueError, match="3 times in a row, up to step 7: lower the learning rate"):
        t.train()


def test_an_infinite_gradient_is_skipped_too():
    t = trainer([batch()], config=config(log_every=1))
    head = t.model.head.weight
    handle = head.register_hook(lambda g: g * float("inf"))
    before = head.detach().clone()
    t.train()
    handle.remove()
    assert int(t.train_step.nonfinite.skipped) == 4 and torch.equal(head, before)


def test_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        trainer([]).train()


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(grad_accum_steps=0), dict(max_grad_norm=-1.0), dict(log_every=0),
    dict(max_grad_norm=math.nan), dict(dtype="fp8"), dict(minutes=0), dict(steps=2.5)])
def test_impossible_settings_are_refused(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name}.{{1,2}}{value!r}"):
        TrainConfig(**bad)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_restores_the_handlers(tmp_path, number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    class Loader(list):
        def __iter__(self):
            for i in range(100):
                if i == 5:  # in the middle of step 3: two micro-batches a step
                    signal.raise_signal(number)
                yield batch(seed=i)

        def state_dict(self):
            return {}

    t = trainer(Loader(), config=config(steps=50, grad_accum_steps=2), out_dir=tmp_path)
    t.train()
    assert (t.progress.step, t.interrupted) == (3, number)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_without_a_terminal_lines_are_short_and_few():
    out = StringIO()
    with redirect_stdout(out):
        trainer([batch()], config=config(steps=100, log_every=1), quiet=False).train()
    lines = out.getvalue().splitlines()
    assert 8 <= len(lines) <= 12 and max(map(len, lines)) < 80


def test_quiet_prints_nothing():
    out = StringIO()
    with redirect_stdout(out):
        trainer([batch()]).train()
    assert out.getvalue() == ""


# --- contracts ---


class Tuple(NextToken):
    def forward(self, batch):
        return tuple(super().forward(batch))


class Mean(NextToken):
    def forward(self, batch):
        output = super().forward(batch)
        return output._replace(loss_sum=output.loss_sum / output.n_valid)


class Tensor(NextToken):
    def forward(self, batch):
        return super().forward(batch).loss_sum


class Each(NextToken):
    def forward(self, batch):
        return super().forward(batch)._replace(loss_sum=torch.ones(4))


@pytest.mark.parametrize(("objective", "line"), [
    (Tuple, "the objective returned a tuple; an objective is a module that keeps the model"),
    (Tensor, "the objective returned a Tensor; an objective"),
    (Mean, "same for one example and for two: it is a mean"),
    (Each, r"loss_sum has shape \(4,\)"),
    (lambda model: lambda batch: None, "the objective is a function; an objective"),
    (lambda model: model.head, "Linear has no `.model`; an objective"),
])
def test_an_objective_that_breaks_its_contract_is_named(objective, line):
    with pytest.raises(ValueError, match=line) as error:
        trainer([batch()], objective=objective).train()
    assert "NextTokenObjective(model)" in str(error.value) or "sum" in str(error.value)


def test_a_model_instead_of_an_objective_is_named():
    model = nn.Module()
    model.model, model.lm_head = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Module is a model; an objective is a module"):
        Trainer(model, [batch()])
    with pytest.raises(ValueError, match="is a model"):
        evaluate(model, [batch()])


@pytest.mark.parametrize(("options", "line"), [
    (dict(optimizer=torch.optim.SGD([torch.zeros(1)], lr=1)), "optimizer is a SGD; give a config"),
    (dict(optimizer=3e-4), "optimizer is a float; .* such as AdamWConfig"),
    (dict(schedule=lambda step: 1.0), "schedule is a function; .* such as ScheduleConfig"),
    (dict(config={"steps": 3}), "config is a dict; give a TrainConfig"),
])
def test_wrong_parts_are_named_before_any_work(options, line):
    with pytest.raises(ValueError, match=line):
        Trainer(NextToken(Bigram()), [batch()], **options)


@pytest.mark.parametrize(("loader", "line"), [
    (None, "the loader is a NoneType"),
    ([(1, 2)], "the loader gave a tuple; a batch is a dict of tensors"),
    ([{"input_ids": [1, 2]}], "the loader gave a dict; a batch is a dict of tensors"),
])
def test_a_wrong_loader_or_batch_is_named(loader, line):
    with pytest.raises(ValueError, match=line):
        trainer(loader).train()


def test_the_checks_leave_dropout_and_random_numbers_as_they_were():
    torch.manual_seed(0)
    from skylar.training.objective import check_contract
    model = Bigram(dropout=0.5).train()
    before = torch.get_rng_state()
    check_contract(NextToken(model), batch())
    assert torch.equal(torch.get_rng_state(), before) and model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_refused_unless_frozen(dtype):
    with pytest.raises(ValueError, match=r"table.weight is (bfloat16|float16): .*model.float\(\)"):
        trainer([batch()], model=Bigram().to(dtype))
    model = Bigram()
    model.table.requires_grad_(False).to(dtype)
    trainer([batch()], model=model)


class SGDConfig:
    """Not fused: the decision is made on the host."""

    def build(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)


def test_an_optimizer_that_is_not_fused_does_the_same():
    t = Trainer(NextToken(Bigram()), [batch(seed=i) for i in range(4)], config(), quiet=True,
                optimizer=SGDConfig(), schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    t.train()
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for b in (batch(seed=i) for i in range(4)):
        F.cross_entropy(model(b["input_ids"]).flatten(0, 1), b["labels"].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(t), plain, rtol=0, atol=1e-6)
    bad = Trainer(Broken(Bigram(), set(range(9))), [batch()], config(), quiet=True,
                  optimizer=SGDConfig())
    before = weights(bad)
    bad.train()
    assert torch.equal(weights(bad), before) and int(bad.train_step.nonfinite.skipped) == 4


def test_clipping_equals_torch_through_the_fused_step():
    t = trainer([batch()], config=config(max_grad_norm=0.01, steps=3))
    t.train()
    model = Bigram()
    optimizer = AdamWConfig(lr=1e-2).build(model)
    for _ in range(3):
        b = batch()
        F.cross_entropy(model(b["input_ids"]).flatten(0, 1), b["labels"].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    plain = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(t), plain, rtol=0, atol=1e-6)


class CountsReads(torch.utils._python_dispatch.TorchDispatchMode):
    """How often a tensor's number was asked for: on a GPU the host waits each time."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_numbers_are_read_at_log_time_only():
    t = trainer([batch()], config=config(steps=100, log_every=50))
    batches = iter([batch()] * 100)
    with CountsReads() as count:
        for step in range(20):
            t.metrics.add(t.train_step(batches, step), 0.1)
        assert count.reads == 0
        t.metrics.row(20)
        assert count.reads > 0


def test_metrics_of_the_objective_are_means_over_targets_not_over_batches():
    data = [batch(seed=i, masked=0.8 * i) for i in range(2)]
    t = trainer(data, config=config(steps=1, grad_accum_steps=2))
    right = n = 0
    model = Bigram()
    for b in data:
        hit, count = NextToken(model)(b).metrics["accuracy"]
        right, n = right + int(hit), n + int(count)
    assert t.train()[0]["accuracy"] == pytest.approx(right / n)


def test_a_callback_stops_and_saves(tmp_path):
    t = trainer([batch()], config=config(steps=50, log_every=2), out_dir=tmp_path,
                callbacks=[lambda row: row["step"] >= 6, lambda row: "not True"])
    assert t.train()[-1]["step"] == 6 == t.progress.step and t.interrupted is None
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000006\n"


def test_a_terminal_that_went_away_does_not_stop_the_run(tmp_path, monkeypatch):
    class Gone(StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Gone())
    t = trainer([batch()], quiet=False, out_dir=tmp_path)
    t.train()
    assert (tmp_path / "checkpoints" / "latest").exists()


def test_validation_losses_stay_in_a_terminal_with_the_time_left(monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout", out)
    trainer([batch()], config=config(steps=30, log_every=1, eval_every=10), quiet=False,
            eval_loader=[batch(seed=9)]).train()
    text = out.getvalue()
    assert all(f"step{step:>7}" in text for step in (10, 20, 30))
    assert "val loss" in text and " left" in text


def test_ignored_signals_stay_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


class Ordered:
    """One pass over nine rows in order, again and again; the last batch may be smaller."""

    def __init__(self, size):
        self.size, self.data = size, batch(rows=9, seed=3, masked=0.4)

    def __len__(self):
        return -(-9 // self.size)

    def __iter__(self):
        while True:
            for i in range(0, 9, self.size):
                yield {k: v[i:i + self.size] for k, v in self.data.items()}


@pytest.mark.parametrize("n_batches", [None, 1000])
def test_no_target_counts_twice_whatever_the_batch_size(n_batches):
    losses = [evaluate(NextToken(Bigram()), Ordered(size), n_batches, dtype="float32")["val_loss"]
              for size in (1, 2, 3, 5, 7, 9, 16)]
    assert losses == pytest.approx([losses[0]] * 7, rel=1e-6)
