"""Train, export and measure the model in assets/shakespeare.

    python tools/train_asset.py            # all three, about an hour on one busy core
    python tools/train_asset.py --export   # export and measure the run in runs/asset again

The recipe is configs/asset.yaml. A stopped run goes on where it was. The model is evaluated as
readers get it: opened from the exported folder, its bf16 weights, every token of the four
held-out plays, which neither the model nor its tokenizer has seen.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
import yaml
from ngram_baseline import SLICE

from skylar.data.held_out import (
    ngram_baseline,
    text_bits_per_byte,
    train_text,
    val_plays,
    val_text,
)
from skylar.models.decoder import count_parameters
from skylar.models.hub import from_pretrained, load_tokenizer, save_pretrained
from skylar.training.run import RunConfig, build_config, load_run, prepare_run, train
from skylar.utils.files import sha256_file

ROOT = Path(__file__).parents[1]
CONFIG, OUT = ROOT / "configs" / "asset.yaml", ROOT / "assets" / "shakespeare"
LIMIT = 4_000_000  # bytes of the whole folder


def config() -> RunConfig:
    """The recipe, with its folders inside the course's tree."""
    values = yaml.safe_load(CONFIG.read_text())
    paths = {name: str(ROOT / values[name]) for name in ("data", "out")}
    return build_config(RunConfig, values | paths | {"resume": True})


def seconds_of(metrics: Path) -> float:
    """Seconds of training, without evaluations, from the rows of a run."""
    seconds, tokens = 0.0, 0
    for row in map(json.loads, metrics.read_text().splitlines()):
        seconds += (row["tokens"] - tokens) / row["tokens_per_s"]
        tokens = row["tokens"]
    return seconds


def measure(folder: Path) -> dict:
    """Bits per byte of the exported weights, opened as a reader opens them."""
    model, tokenizer = from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    context = model.config.max_seq_len
    return {
        "bits_per_byte": round(text_bits_per_byte(model, tokenizer, val_plays(), context), 4),
        "slice": {"bytes": [SLICE.start, SLICE.stop], "bits_per_byte": round(
            text_bits_per_byte(model, tokenizer, val_text()[SLICE], context), 4)},
        "training_text_bits_per_byte": round(
            text_bits_per_byte(model, tokenizer, train_text()[:500_000], context), 4)}


def export(run_folder: Path, out: Path) -> dict:
    """The run's model as bf16 in `out`, with its metrics and its card."""
    model, tokenizer, metadata = load_run(run_folder)
    shutil.rmtree(out, ignore_errors=True)
    save_pretrained(model.bfloat16(), out, tokenizer)
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    recipe = metadata["run"]
    metrics = measure(out) | {
        "unit": "bits per byte of the four held-out plays; windows of 256 tokens",
        "best_ngram": ngram_baseline(), "parameters": count_parameters(model.config),
        "steps": rows[-1]["step"], "tokens": rows[-1]["tokens"],
        "training_seconds": round(seconds_of(run_folder / "metrics.jsonl")), "threads": 1,
        "sha256": {name: sha256_file(out / name) for name in ("model.safetensors",
                                                             "tokenizer.json")},
        "recipe": {name: recipe[name] for name in ("corpus", "model", "loader", "train",
                                                   "optimizer", "schedule")}}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (out / "README.md").write_text(card(metrics))
    size = sum(file.stat().st_size for file in out.iterdir())
    assert size <= LIMIT, f"{out} has {size:,} bytes, more than {LIMIT:,}"
    return metrics | {"bytes": size}


def card(m: dict) -> str:
    """The model's card."""
    best, shape, recipe = m["best_ngram"], m["recipe"]["model"], m["recipe"]
    sizes = (f"{shape['n_layers']} layers, width {shape['d_model']}, {shape['n_heads']} heads, "
             f"{shape['n_kv_heads']} KV heads of {shape['d_head']}, SwiGLU of {shape['d_ff']}")
    batch = f"{recipe['loader']['batch_size']} x {recipe['loader']['seq_len']}"
    rows = {
        "architecture": f"Qwen3: {sizes}, RoPE, tied embeddings",
        "context": f"{shape['max_seq_len']} tokens",
        "tokenizer": f"byte-level BPE, {recipe['corpus']['vocab_size']:,} tokens, trained on the "
                     "training plays",
        "weights": f"bfloat16; SHA-256 `{m['sha256']['model.safetensors'][:16]}...`",
        "data": "34 plays of Shakespeare, 4.5 MB; held out: Macbeth, Othello, Romeo and Juliet, "
                "Timon of Athens",
        "training": f"{m['steps']:,} steps of {batch} tokens, AdamW, bf16 autocast, one CPU core",
        "**held-out plays**": f"**{m['bits_per_byte']:.2f} bits per byte**",
        "best n-gram table, same plays": f"{best['bits_per_byte']:.2f} bits per byte "
                                         f"(order {best['order']}, {best['kind']})",
        "a part of the training plays": f"{m['training_text_bits_per_byte']:.2f} bits per byte",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# A small model of Shakespeare

A Qwen3 of {m["parameters"]:,} parameters for the lessons of this course: it generates, attends and
caches like a large one, and fits into a Git repository. It is of no other use.

| | |
|---|---|
{table}

Open it with `from_pretrained("assets/shakespeare")` and `load_tokenizer("assets/shakespeare")`
of `skylar.models.hub`, with `skylar generate --model assets/shakespeare`, or with
`AutoModelForCausalLM.from_pretrained("assets/shakespeare")` of transformers.

Made by `python tools/train_asset.py` from `configs/asset.yaml`; `metrics.json` holds all numbers.
The n-gram tables are made by `python tools/ngram_baseline.py`.

License: the text is in the public domain; code and weights are under this repository's license.
"""


def main(only_export: bool) -> None:
    settings = config()
    if not only_export:
        result = train(prepare_run(settings))
        assert result.finished, "stopped; the same command goes on"
    metrics = export(Path(settings.out), OUT)
    print(json.dumps({k: v for k, v in metrics.items() if k != "recipe"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", action="store_true", help="of a finished run, without training")
    main(parser.parse_args().export)
