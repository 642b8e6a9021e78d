"""The demo end to end on a corpus of a few kilobytes: same code, seconds instead of minutes."""

from pathlib import Path

import pytest

from skylar.cli import main

TINY = """--corpus.vocab_size 300 --model.d_model 16 --model.d_head 4 --model.n_layers 1
    --model.d_ff 32 --loader.batch_size 2 --loader.seq_len 32 --train.steps 6
    --train.eval_every 3 --train.eval_batches 2 --train.device cpu --minutes null""".split()


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "ROMEO:\nBut soft, what light through yonder window breaks?\n\n"
    for i in range(24):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text * (10 + i))
    return ["demo", "--corpus.source", "texts", *TINY]


def test_demo_then_again(demo, capsys):
    assert main(demo) == 0
    out = capsys.readouterr().out
    assert "training a tokenizer" in out and "\nROMEO:\n" in out
    assert Path("demo/loss.png").read_bytes().startswith(b"\x89PNG")
    before = {p: p.stat().st_mtime_ns for p in Path("demo").rglob("*")
              if p.is_file() and p.name != "loss.png"}
    assert main(demo) == 0
    again = capsys.readouterr().out
    assert "nothing to train" in again and "training a tokenizer" not in again
    assert again.split("ROMEO")[-1] == out.split("ROMEO")[-1]  # the same sample
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_demo_with_other_settings_keeps_the_finished_run(demo, capsys):
    assert main(demo) == 0
    capsys.readouterr()
    assert main([*demo, "--train.steps", "8"]) == 2
    assert "another --out" in capsys.readouterr().err


def test_demo_without_matplotlib(demo, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "skylar.viz", None)
    assert main(demo) == 0
    out = capsys.readouterr().out
    assert 'pip install "skylar[viz]"' in out and "ROMEO:" in out
    assert not Path("demo/loss.png").exists()
