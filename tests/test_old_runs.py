"""Checkpoints of an older version, which lack settings and parts that came later."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from skylar.training.checkpoint import check_same
from skylar.training.checkpoint_files import find_checkpoint
from skylar.training.muon import OptimizerConfig
from skylar.training.objective import LossOutput
from skylar.training.optim import AdamWConfig
from skylar.training.trainer import TrainConfig, Trainer, default_of
from skylar.utils.files import write_manifest


class Squares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 1)

    def forward(self, batch):
        loss = self.model(batch["x"]).square()
        return LossOutput(loss.sum(), loss.numel(), {})


class Batches(list):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@dataclass(frozen=True, kw_only=True)
class NewerConfig(AdamWConfig):
    "An optimizer's config of a later version: one setting more."

    cautious: bool = False


def run(out: Path, steps: int, optimizer=None, **train) -> Trainer:
    config = TrainConfig(steps=steps, log_every=1, device="cpu")
    trainer = Trainer(Squares(), Batches([{"x": torch.ones(4, 3)}]), config, out_dir=out,
                      optimizer=optimizer or NewerConfig(), quiet=True)
    trainer.train(**train)
    return trainer


def edit(out: Path, change) -> None:
    "Change state.json of the newest checkpoint, as an older version would have written it."
    folder = find_checkpoint(out)
    state = json.loads((folder / "state.json").read_text())
    change(state["extra"])
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    write_manifest(folder)


def test_a_setting_that_the_checkpoint_lacks_is_compared_with_its_default(tmp_path):
    run(tmp_path, 3)
    edit(tmp_path, lambda extra: extra["settings"]["optimizer"].pop("cautious"))
    with pytest.raises(ValueError, match="optimizer.cautious False, now it is True"):
        run(tmp_path, 6, NewerConfig(cautious=True), resume=True, extend=True)
    assert run(tmp_path, 6, resume=True, extend=True).progress.step == 6


def test_a_part_that_the_checkpoint_lacks_starts_anew(tmp_path):
    run(tmp_path, 3)
    edit(tmp_path, lambda extra: extra.pop("nonfinite"))
    assert run(tmp_path, 6, resume=True, extend=True).progress.step == 6


def test_without_a_default_nothing_is_known_of_a_missing_setting():
    check_same({"a": 1}, {"a": 1, "b": 2}, Path("run"))
    check_same({"a": {}}, {"a": {"b": 2}}, Path("run"), defaults={"a": {"b": 2}})
    with pytest.raises(ValueError, match="run has a.b 3, now it is 2"):
        check_same({"a": {}}, {"a": {"b": 2}}, Path("run"), defaults={"a": {"b": 3}})

    @dataclass
    class Needs:
        size: int

    needs = Needs(3)
    assert default_of(needs) is needs and default_of(AdamWConfig(lr=1)) == AdamWConfig()


def test_the_run_config_of_an_older_version(tmp_path):
    from dataclasses import asdict, replace

    from skylar.training.run import RunConfig, build_config
    from skylar.training.run import check_same as check_run

    given = RunConfig(data="data", out="run")
    old = asdict(given)
    del old["schedule"], old["optimizer"]["eps"]
    saved = build_config(RunConfig, old)
    check_run(saved, given, tmp_path)
    with pytest.raises(ValueError, match="optimizer.eps is 1e-08 .* but 0.001 now"):
        check_run(saved, replace(given, optimizer=OptimizerConfig(eps=1e-3)), tmp_path)
