"""Corpus to checked shards, against the bare Rust `encode_batch` that only makes tokens.

    python bench/tokenize.py

Both sides get the same documents and tokenizer in one process, in turns; medians. Ours also
reads no faster than it is told to, adds <bos> and <eos>, hashes, writes and syncs to disk.
Target: at least 80 % of the rate of the bare call."""

if __name__ == "tokenize":
    # Python puts the folder of a running script first on its path, so for every script here
    # this file hides the standard library's module of the same name: hand that over instead.
    import importlib.util
    import os
    import sys

    path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    spec = importlib.util.spec_from_file_location("tokenize", path)
    sys.modules["tokenize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["tokenize"])


def corpora() -> dict[str, list[str]]:
    """Two extremes: few long documents, and many short ones (5 MB each)."""
    from skylar.data.sources import documents

    plays = list(documents("shakespeare"))
    speeches = [speech for play in plays for speech in play.split("\n\n")]
    return {"plays": plays, "speeches": speeches}


def seconds(work) -> float:
    """Wall clock of one call."""
    import time

    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(texts: list[str], tokenizer, bare, runs: int) -> dict:
    """Medians over `runs` turns: bare `encode_batch`, its fast variant, and `write_shards`."""
    import statistics
    import tempfile
    from pathlib import Path

    from skylar.data.shards import write_shards

    with tempfile.TemporaryDirectory() as folder:
        names = iter(range(10_000))
        sides = {
            "encode_batch": lambda: bare.encode_batch(texts, add_special_tokens=False),
            "encode_batch_fast": lambda: bare.encode_batch_fast(texts, add_special_tokens=False),
            "write_shards": lambda: write_shards(
                texts, tokenizer, Path(folder, str(next(names))), progress=False),
        }
        times = {name: [] for name in sides}
        for _ in range(runs):
            for name, work in sides.items():
                times[name].append(seconds(work))
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    import argparse
    import tempfile
    from pathlib import Path

    import tokenizers
    from common import record

    from skylar.data.tokenizer import BPETokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    rows = []
    for name, texts in corpora().items():
        tokenizer = BPETokenizer.train(texts, 8192)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(folder)
            bare = tokenizers.Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        took = compare(texts, tokenizer, bare, args.runs)
        megabytes = sum(len(t.encode()) for t in texts) / 1e6
        rows.append({
            "corpus": name, "documents": len(texts), "megabytes": round(megabytes, 1),
            **{f"{side}_mb_per_s": round(megabytes / t, 2) for side, t in took.items()},
            "share_of_bare": round(took["encode_batch"] / took["write_shards"], 3),
            "share_of_bare_fast": round(took["encode_batch_fast"] / took["write_shards"], 3),
        })
    if args.dry:
        return print(*rows, sep="\n")
    record("tokenize", rows, target="share_of_bare >= 0.8", runs=args.runs)


if __name__ == "__main__":
    main()
