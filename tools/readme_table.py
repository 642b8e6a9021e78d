"""Fill the README's tables from bench/results/*.json and the lessons' first cells.

    python tools/readme_table.py            # rewrite README.md
    python tools/readme_table.py --check    # exit 1 if README.md would change

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`. No number in them is typed.
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "nbdev_commands"))

from nbdev_commands import notebooks  # noqa: E402

RESULTS = ROOT / "bench" / "results"


def table(header: list[str], rows: list[list[str]]) -> str:
    "A Markdown table."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def result(name: str) -> dict:
    "What `bench/NAME.py` wrote."
    return json.loads((RESULTS / f"{name}.json").read_text())


def first_cell(path: Path) -> dict[str, str]:
    "Title and box of a lesson, from its first cell."
    cell = "".join(json.loads(path.read_text())["cells"][0]["source"])
    box = dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+?) \|$", cell, flags=re.MULTILINE))
    return {"title": re.search(r"^# (.+)$", cell, flags=re.MULTILINE)[1], **box}


def lessons() -> str:
    "The map: lesson, what it builds, seconds, module."
    seconds = {row["lesson"]: row["seconds"] for row in result("lessons")["rows"]}
    rows = []
    for path in notebooks(ROOT / "nbs"):
        name, box = path.relative_to(ROOT).as_posix(), first_cell(path)
        if "Exports" not in box:  # the map itself
            continue
        link = f"[{path.stem.replace('_', ' ')}]({name})"
        modules = ", ".join(re.findall("`skylar/.+?`", box["Exports"]))
        took = f"{seconds[name]:.0f} s" if name in seconds else "not measured"
        rows.append([link, box["title"], took, modules])
    header = ["lesson", "what it is about", "runs in", "becomes"]
    return table(header, rows) + f"\n\nAll together: {sum(seconds.values()) / 60:.1f} minutes."


PEERS = {"gpt2": "Hugging Face GPT-2", "qwen3": "Hugging Face Qwen3"}


def train_step_rows(family: str) -> list[list[str]]:
    "Ours against Hugging Face's model of the same shape, and packed against unpacked."
    found = result(f"train_step_{family}")
    rows = []
    for row in found["rows"]:
        what = f"training step, {family} `{row['shape']}` shape, {row['batch']} tokens, bf16"
        other = f"{row.get('transformers_tokens_per_s', 0):,} tokens/s ({PEERS[family]})"
        if row["mode"] == "packed":
            other = f"{row['unpacked_tokens_per_s']:,} tokens/s (ours, one document a row)"
        rows.append([f"{what}, {row['mode']}", f"{row['skylar_tokens_per_s']:,} tokens/s",
                     other, f"{row['ratio']:.2f}x", f"{row['target']}x"])
    return rows


def decode_rows() -> list[list[str]]:
    "Cached decoding and reading a prompt, against transformers."
    return result("decode")["summary"]


def gpu_rows() -> list[list[str]]:
    "Training on a GPU: share of its matmul ceiling, packed and unpacked."
    found = result("gpu_train")
    if not found["rows"]:
        return [[f"{what} on a GPU", found["status"], "", "", ""] for what in (
            "`medium` (107M) training at 2,048 tokens, share of the matmul ceiling",
            "packed documents by FlexAttention against unpacked, at 2K and 8K")]
    return [[f"`{row['preset']}` training, {row['length']:,} tokens, "
             f"{'packed' if row['packed'] else 'unpacked'}", f"{row['tokens_per_s']:,} tokens/s",
             f"{found['ceiling_tflops']} TFLOP/s ({found['device']}, matmul)",
             f"{row['share_of_ceiling']:.0%}", f"{row['target']:.0%}" if row["target"] else ""]
            for row in found["rows"]]


def time_to_quality_rows() -> list[list[str]]:
    "The fastest recipe of chapter 00 against the classic one."
    found = result("time_to_quality")

    def middle(recipe, key):
        return statistics.median(r[key] for r in found["rows"] if r["recipe"] == recipe)

    what = "character-level Shakespeare: training until the classic recipe's final loss"
    loss = middle("classic", "val_loss")
    return [[f"{what} ({loss:.2f} nats)", f"{middle('fast', 'seconds'):.0f} s",
             f"{middle('classic', 'seconds'):.0f} s (4 layers, 128 wide, 2,000 x 12 x 64)",
             f"{found['median_speedup']:.2f}x", "2x"]]


def loader_rows() -> list[list[str]]:
    "Tokens handed out against tokens trained on."
    row = min(result("loader")["rows"], key=lambda r: r["ratio"])
    return [["batches from disk (slowest setting)", f"{row['loader_tokens_per_s']:,} tokens/s",
             f"{row['training_tokens_per_s']:,} tokens/s (training, `test` preset)",
             f"{row['ratio']:,}x", "100x"]]


def tokenize_rows() -> list[list[str]]:
    "Corpus to shards against the bare encoder."
    return [[f"corpus to shards ({row['corpus']})", f"{row['write_shards_mb_per_s']:.1f} MB/s",
             f"{row['encode_batch_mb_per_s']:.1f} MB/s (bare `encode_batch`)",
             f"{row['share_of_bare']:.2f}x", "0.8x"] for row in result("tokenize")["rows"]]


def bench() -> str:
    "One row a measurement: what, ours, theirs, ratio, target."
    rows = [*train_step_rows("qwen3"), *train_step_rows("gpt2"), *decode_rows(), *gpu_rows(),
            *time_to_quality_rows(), *loader_rows(), *tokenize_rows()]
    return table(["what", "Skylar", "the other side", "ratio", "target"], rows)


def machine() -> str:
    "Where the numbers were measured."
    header = result("train_step_qwen3")
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items() if k != "skylar")
    m = header["machine"]
    return f"Measured on {m['cpu']}, {m['cores']} cores, {m['system']}; {versions}."


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
    old = readme.read_text()
    new = filled(old)
    if "--check" in sys.argv:
        if new != old:
            print("README.md: tables are stale; run `python tools/readme_table.py`")
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
