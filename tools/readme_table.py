"""Fill the README's tables from bench/results/*.json and the lessons' first cells.

    python tools/readme_table.py            # rewrite README.md
    python tools/readme_table.py --check    # exit 1 if README.md would change

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`. No number in them is typed.
What no file in bench/results holds, or only one in the format of an older script, is called
"not measured".
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "nbdev_commands"))

from nbdev_commands import notebooks  # noqa: E402

RESULTS = ROOT / "bench" / "results"
NOT_MEASURED = "not measured"


def table(header: list[str], rows: list[list[str]]) -> str:
    "A Markdown table."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(name: str) -> dict:
    "What `bench/NAME.py` wrote."
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def first_cell(path: Path) -> dict[str, str]:
    "Title and box of a notebook, from its first cell."
    cell = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    box = dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \|$", cell, flags=re.MULTILINE))
    return {"title": re.search(r"^# (.+)$", cell, flags=re.MULTILINE)[1], **box}


# --- lessons ---

CHAPTERS = {  # folder of a notebook -> heading of its table
    "00_transformer": "Chapter 00: from raw text to a trained GPT",
    "01_gqa_rope": "Chapter 01: the modern dense decoder",
    "02_moe": "Chapter 02: sparse experts",
    "03_mla": "Chapter 03: latent attention",
    "04_posttrain": "Chapter 04: post-training",
    "library": "Library notebooks: the plumbing, same export, same tests, no exercises",
    "": "Beside the lessons",
}


def measured_seconds() -> dict[str, float]:
    "Notebook -> seconds, of those that `make lessons` has measured."
    try:
        return {row["lesson"]: row["seconds"] for row in result("lessons")["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def lesson_row(path: Path, seconds: dict[str, float]) -> list[str]:
    "One line of the map: link, title, seconds, module."
    name, box = path.relative_to(ROOT).as_posix(), first_cell(path)
    modules = ", ".join(re.findall("`skylar/.+?`", box["Exports"]))
    took = f"{seconds[name]:.0f} s" if name in seconds else NOT_MEASURED
    return [f"[{path.stem.replace('_', ' ')}]({name})", box["title"], took, modules]


def lessons() -> str:
    "A table a chapter, and how long all of them run."
    seconds, nbs, found = measured_seconds(), ROOT / "nbs", {}
    for path in notebooks(nbs):
        if "Exports" in first_cell(path):  # the map itself has none
            chapter = path.parent.relative_to(nbs).as_posix()
            found.setdefault("" if chapter == "." else chapter, []).append(path)
    parts, header = [], ["notebook", "what it is about", "runs in", "exports"]
    for chapter, paths in found.items():
        rows = table(header, [lesson_row(path, seconds) for path in paths])
        parts.append(f"**{CHAPTERS.get(chapter, chapter)}**\n\n{rows}")
    names = [path.relative_to(ROOT).as_posix() for paths in found.values() for path in paths]
    known = [seconds[name] for name in names if name in seconds]
    total = f"All together: {sum(known) / 60:.1f} minutes"
    if missing := len(names) - len(known):
        total += f", without the {missing} that are not measured"
    return "\n\n".join([*parts, total + "."])


# --- benchmarks: each function yields [what, Skylar, the other side, ratio, target] ---

PEERS = {"gpt2": "transformers' GPT-2", "qwen3": "transformers' Qwen3",
         "mixtral": "transformers' Mixtral", "deepseek_v3": "transformers' DeepSeek-V3"}


def grid_name(case: str, layers: int) -> str:
    "`grid-256-8192-1024` in words."
    width, vocabulary, length = map(int, case.split("-")[1:])
    return (f"Qwen3 of {layers} layers, width {width}, vocabulary {vocabulary:,}, "
            f"sequences of {length:,}")


def training_rows(family: str) -> Iterator[list[str]]:
    "The grid's worst row and median, then the named rows, against transformers."
    found = result(f"train_step_{family}")
    grid, how = found.get("grid"), found["dtype"].removesuffix(", float32 weights")
    for row in found["rows"]:
        case, target = row["case"], f"{row['target']}x"
        what = f"{family} `{case}`, {row['batch']} tokens"
        if case.startswith("grid"):
            if case != grid["worst"]["case"]:
                continue
            what = f"{grid_name(case, found['layers_of_grid'])} (worst of the grid)"
        other = f"{row.get('transformers_tokens_per_s', 0):,} tokens/s ({PEERS[family]})"
        if row["mode"] == "packed":
            other = f"{row['unpacked_tokens_per_s']:,} tokens/s (ours, one document a sequence)"
        if row["mode"] == "dense":
            other = f"{row['dense_tokens_per_s']:,} tokens/s (dense, equal active parameters)"
        yield [f"training step, {what}, {how}", f"{row['skylar_tokens_per_s']:,} tokens/s",
               other, f"{row['ratio']:.2f}x", target]
    if grid:
        yield [f"training step, median of {grid['rows']} Qwen3 models of widths 128 to 512", "",
               "", f"{grid['median']:.2f}x", f"{grid['target']}x"]


def decode_rows() -> Iterator[list[str]]:
    "Plain `generate` and reading a prompt, against transformers: lines that the script made."
    found = result("decode")
    if "grid" not in found:
        raise KeyError("grid")  # measured by an older script
    yield from found["summary"]


def latent_rows() -> Iterator[list[str]]:
    "One absorbed layer at its worst, and whole models at the longest context."
    rows = result("decode_deepseek_v3")["rows"]
    layers = [row for row in rows if row["part"] == "one layer"]
    for S in sorted({row["context"] for row in layers}):
        row = min((r for r in layers if r["context"] == S), key=lambda r: r["ratio"])
        yield [f"decoding, one absorbed layer of latent attention, {S:,} tokens cached "
               f"(worst of {sum(r['context'] == S for r in layers)}: `{row['case']}`)",
               f"{row['ours_ms']:.1f} ms", f"{row['theirs_ms']:.1f} ms (transformers)",
               f"{row['ratio']:.1f}x", f"{row['target']:.0f}x" if S > 512 else ""]
    models = [row for row in rows if row["part"] == "whole model"]
    for row in models:
        if row["context"] == max(r["context"] for r in models):
            yield [f"decoding, a whole DeepSeek-V3 of {row['parameters'] / 1e6:.0f}M parameters, "
                   f"{row['case'].split('-')[1]}, {row['context']:,} tokens cached",
                   f"{row['skylar_tokens_per_s']:,} tokens/s",
                   f"{row['transformers_tokens_per_s']:,} tokens/s (transformers)",
                   f"{row['ratio']:.1f}x", f"{row['target']:.0f}x"]


def attention_rows() -> Iterator[list[str]]:
    "The largest shape of the tiled CPU kernel, where `auto` takes it."
    rows = result("attention")["rows"]
    largest = max((row["width"], row["length"]) for row in rows)
    for row in rows:
        chosen = row["packed"] or row["dtype"] == "bfloat16"
        if chosen and (row["width"], row["length"]) == largest:
            kind = "packed documents" if row["packed"] else "one document a sequence"
            yield [f"tiled attention on a CPU, training step of width {row['width']}, "
                   f"sequences of {row['length']:,}, {kind}, {row['dtype']}",
                   f"{row['tiled_ms']:.0f} ms", f"{row['sdpa_ms']:.0f} ms (PyTorch's SDPA)",
                   f"{row['speedup']:.2f}x", ""]


def gpu_rows() -> Iterator[list[str]]:
    "Training on a GPU: share of its matmul ceiling, packed and unpacked."
    found = result("gpu_train")
    rows = [row for row in found["rows"] if "tokens_per_s" in row]
    if not rows or found["status"].startswith(("not run", "dry")):
        why = found["status"] if found["status"].startswith("not run") else "not run"
        for what in ("`medium` deepened to 125M, training at 2,048 tokens on a GPU, share of "
                     "the matmul ceiling",
                     "packed documents by FlexAttention against unpacked, 2K and 8K, on a GPU",
                     "FlexAttention against dense masks; decoding against transformers, on a GPU",
                     "Mixtral against a dense model of equal cost, share of the matmul ceiling; "
                     "absorbed latent decoding at 8K to 64K, on a GPU"):
            yield [what, why, "`bench/gpu.sh`", "", ""]
        return
    ceiling = f"{found['ceiling_tflops']} TFLOP/s ({found.get('device', 'GPU')}, matmul)"
    for row in rows:
        packed = "packed" if row["packed"] else "unpacked"
        yield [f"`{row['preset']}` ({row['parameters_m']:.0f}M) training on a GPU, "
               f"{row['length']:,} tokens, {packed}, {row['compiled']} compiled",
               f"{row['tokens_per_s']:,} tokens/s", ceiling, f"{row['share_of_ceiling']:.0%}",
               f"{row['target']:.0%}" if row["target"] else ""]


def time_to_quality_rows() -> Iterator[list[str]]:
    "The fastest recipe so far against the classic one: its seconds, its loss in equal seconds."
    found = result("time_to_quality")

    def median(recipe, key):
        return statistics.median(r[key] for r in found["rows"] if r["recipe"] == recipe)

    what = "character-level Shakespeare: training until the classic recipe's final loss"
    yield [f"{what} ({median('classic', 'val_loss'):.2f} nats)",
           f"{median('fast', 'seconds'):.0f} s",
           f"{median('classic', 'seconds'):.0f} s (4 layers, 128 wide, 2,000 x 12 x 64)",
           f"{found['median_speedup']:.2f}x", "3x"]
    if any(r["recipe"] == "same seconds" for r in found["rows"]):
        yield ["character-level Shakespeare: loss in the classic recipe's seconds",
               f"{median('same seconds', 'val_loss'):.2f} nats",
               f"{median('classic', 'val_loss'):.2f} nats", "", ""]


def loss_rows() -> Iterator[list[str]]:
    "Fused cross-entropy in bf16 on all threads: time and added memory against the plain path."
    found = result("loss")
    threads = max(row["threads"] for row in found["rows"])
    for n in (4096, 8192):
        sides = {row["side"]: row for row in found["rows"] if (
            row["dtype"], row["positions"], row["threads"]) == ("bf16", n, threads)}
        ours, plain, core = sides["ours"], sides["plain"], sides["PyTorch fused"]
        what = f"cross-entropy over {found['vocab_size']:,} tokens, {n:,} positions, bf16"
        yield [f"{what}: time", f"{ours['seconds']:.2f} s", f"{plain['seconds']:.2f} s (plain)",
               f"{ours['time_ratio']:.2f}x", "0.75x"]
        yield [f"{what}: added memory", f"{ours['added_mb']:.0f} MB",
               f"{plain['added_mb']:,.0f} MB (plain)", f"{ours['memory_ratio']:.0%}", "12%"]
        yield [f"{what}: time against PyTorch's fused loss in its fastest setting",
               f"{ours['seconds']:.2f} s, loss off by {ours['loss_error']:.0e}",
               f"{core['seconds']:.2f} s, loss off by {core['loss_error']:.0e}",
               f"{ours['seconds'] / core['seconds']:.2f}x", "1x"]
    slow = next(row for row in found["rows"] if row["side"] == "PyTorch default")
    ours = next(row for row in found["rows"] if row["side"] == "ours" and all(
        row[key] == slow[key] for key in ("dtype", "positions", "threads")))
    yield [f"the same, {slow['positions']:,} positions, PyTorch's fused loss as it comes",
           f"{ours['seconds']:.2f} s", f"{slow['seconds']:.2f} s",
           f"{ours['seconds'] / slow['seconds']:.2f}x", "1x"]


def scaling_rows() -> Iterator[list[str]]:
    "FSDP on two processes against two runs side by side that share nothing, and alone."
    found = result("scaling")
    rows = [row for row in found["rows"] if row["way"] == "fsdp"]
    worst = max(rows, key=lambda row: row["ratio_beside"]["median"])
    largest = max(rows, key=lambda row: row["parameters"])
    for row, what in ((worst, "worst of the grid"), (largest, "largest of the grid")):
        yield [f"FSDP on two CPU processes, {row['parameters'] / 1e6:.1f}M parameters ({what})",
               f"{row['tokens_per_s']:,} tokens/s", "time of two runs that share nothing",
               f"{row['ratio_beside']['median']:.2f}x", f"{found['summary']['target']}x"]


def checkpoint_rows() -> Iterator[list[str]]:
    "Share of the wall-clock at one background save a minute."
    found = result("checkpoints")
    row = next(r for r in found["rows"] if (r["preset"], r["saving"]) == ("small", "async"))
    yield [f"one background checkpoint a minute, {row['megabytes']:.0f} MB: all extra time",
           f"{row['extra_s']:.2f} s", "", f"{row['share']:.1%}", f"{row['target']:.0%}"]


def muon_rows() -> Iterator[list[str]]:
    "The default Muon's share of a step of a model of 100M parameters."
    found = result("muon")
    row = next(r for r in found["rows"] if r["optimizer"] == "Muon, bfloat16")
    yield [f"Muon at {found['parameters'] / 1e6:.0f}M parameters, step of 16,384 tokens: its share",
           f"{row['seconds']:.1f} s", "", f"{row['share_of_step_16384']:.1%}", "10%"]


def loader_rows() -> Iterator[list[str]]:
    "Tokens handed out against tokens trained on."
    row = min(result("loader")["rows"], key=lambda r: r["ratio"])
    yield ["batches from disk (slowest setting)", f"{row['loader_tokens_per_s']:,} tokens/s",
           f"{row['training_tokens_per_s']:,} tokens/s (training, `test` preset)",
           f"{row['ratio']:,}x", "100x"]


def tokenize_rows() -> Iterator[list[str]]:
    "Corpus to shards against the bare encoder."
    for row in result("tokenize")["rows"]:
        yield [f"corpus to shards ({row['corpus']})", f"{row['write_shards_mb_per_s']:.1f} MB/s",
               f"{row['encode_batch_mb_per_s']:.1f} MB/s (bare `encode_batch`)",
               f"{row['share_of_bare']:.2f}x", "0.8x"]


def posttrain_rows() -> Iterator[list[str]]:
    "Steps of post-training of SmolLM2-135M against TRL's, and the peak memory of DPO."
    names = {"sft": "SFT", "sft packed": "SFT, packed", "dpo": "DPO", "orpo": "ORPO",
             "dpo precomputed": "DPO, reference computed before", "grpo": "GRPO, rollouts included"}
    for row in result("posttrain")["rows"]:
        what = f"SmolLM2-135M, step of {row['rows']} rows, {names[row['stage']]}"
        yield [what, f"{row['ours_seconds']:.1f} s", f"{row['theirs_seconds']:.1f} s (TRL)",
               f"{row['times_faster']:.2f}x", "1.3x"]
        if row["stage"].startswith("dpo"):
            yield [f"{what}: peak memory", f"{row['ours_peak_mb']:,.0f} MB",
                   f"{row['theirs_peak_mb']:,.0f} MB (TRL)", f"{row['share_of_memory']:.0%}", "60%"]


def distill_rows() -> Iterator[list[str]]:
    "Memory that a distillation step adds, beside both of TRL's losses."
    ours, *theirs = result("distill_memory")["rows"]
    for row in theirs:
        yield [f"distillation step at a vocabulary of 49,152: added memory ({row['side']})",
               f"{ours['peak_mb']:,.0f} MB", f"{row['peak_mb']:,.0f} MB (TRL)",
               f"{row['ours_over_theirs_mb']:.0%}", "60%"]


SOURCES = {  # what is measured, its script -> its rows
    ("training step, qwen3", "train_step.py"): lambda: training_rows("qwen3"),
    ("training step, gpt2", "train_step.py"): lambda: training_rows("gpt2"),
    ("training step, mixtral", "train_step.py"): lambda: training_rows("mixtral"),
    ("training step, deepseek_v3", "train_step.py"): lambda: training_rows("deepseek_v3"),
    ("decoding and reading prompts", "decode.py"): decode_rows,
    ("decoding with latent attention", "decode.py"): latent_rows,
    ("tiled attention on a CPU", "attention.py"): attention_rows,
    ("training on a GPU", "gpu.sh"): gpu_rows,
    ("time to quality", "time_to_quality.py"): time_to_quality_rows,
    ("cross-entropy", "loss.py"): loss_rows,
    ("FSDP on two processes", "scaling.py"): scaling_rows,
    ("checkpoints", "checkpoints.py"): checkpoint_rows,
    ("Muon's share of a step", "muon.py"): muon_rows,
    ("post-training of SmolLM2-135M", "posttrain.py"): posttrain_rows,
    ("distillation", "distill_memory.py"): distill_rows,
    ("batches from disk", "loader.py"): loader_rows,
    ("corpus to shards", "tokenize.py"): tokenize_rows,
}


def rows_of(what: str, script: str, make) -> list[list[str]]:
    "Rows of one script; a line that says so where its file is missing or of another format."
    try:
        rows = [[str(cell) for cell in row] for row in make()]
        assert rows and all(len(row) == 5 for row in rows)
        return rows
    except (OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError):
        return [[what, NOT_MEASURED, f"`bench/{script}`", "", ""]]


def bench() -> str:
    "One row a measurement: what, ours, theirs, ratio, target."
    rows = [row for (what, script), make in SOURCES.items() for row in rows_of(what, script, make)]
    return table(["what", "Skylar", "the other side", "ratio", "target"], rows)


def machine() -> str:
    "Where the numbers were measured."
    try:
        header = result("train_step_qwen3")
        versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if k != "skylar")
        m = header["machine"]
        return f"Measured on {m['cpu']}, {m['cores']} cores, {m['system']}; {versions}."
    except (OSError, LookupError, ValueError, TypeError, AttributeError):
        return "Not measured."


TABLES = {"lessons": lessons, "bench": bench, "machine": machine}


def filled(text: str) -> str:
    "`text` with every table made anew."
    for name, make in TABLES.items():
        mark = rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)"
        text, found = re.subn(
            mark, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        assert found == 1, f"README.md has {found} places for the table {name!r}"
    return text


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv:
        if new != old:
            print("README.md: tables are stale; run `python tools/readme_table.py`")
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
