"""The strongest simple n-gram tables of Shakespeare's bytes, judged on the held-out plays.

    python tools/ngram_baseline.py          # writes assets/ngram.json, about half a minute
    python tools/ngram_baseline.py --orders 6 --dry

An n-gram table of order n predicts a byte from the n - 1 bytes before it. Five ways to deal with
what it has never seen, each with its number tuned for each order on the last tenth of the
*training* text, and then counted again on all of it:

- add-constant: (c + a) / (N + a V), the usual first baseline
- witten-bell: interpolated with the next shorter order; the more different bytes followed a
  context, the more the shorter one counts (Witten and Bell 1991), times a constant
- kneser-ney: a discount off every count, and shorter orders that count in how many contexts
  a byte occurred, not how often (Kneser and Ney 1995, interpolated)
- modified kneser-ney: three discounts, from the counts of counts; nothing is tuned (Chen and
  Goodman 1999)
- pitman-yor: the same with a strength added to every context's count, as in the hierarchical
  Pitman-Yor model (Teh 2006)

The held-out plays decide nothing but the numbers in the file. Same text, same numbers on every
machine: counts are whole numbers, and results are rounded to four digits.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUT = Path(__file__).parents[1] / "assets" / "ngram.json"
SLICE = slice(20_000, 40_000)  # bytes of the held-out text that the tests look at
GRID = {
    "add-constant": (1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "witten-bell": (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0),
    "kneser-ney": (0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99),
    "modified kneser-ney": (None,),
    "pitman-yor": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0),
}


@dataclass(frozen=True)
class Order:
    """What one order knows of every byte to predict: how often its context occurred, and what
    followed."""

    gram: np.ndarray  # c(h, x): how often context and byte occurred
    context: np.ndarray  # c(h) = sum over x of c(h, x)
    followers: np.ndarray  # (3, M) different x with c(h, x) = 1, = 2, >= 3
    counts_of_counts: np.ndarray  # (5,) how many different grams occurred 0, 1, 2, 3, 4 times


def order_of(grams, contexts, counts, owner, where) -> Order:
    """`counts` of the different grams, `owner` their contexts; looked up at `where`."""
    n_contexts = contexts.max() + 1
    total = np.bincount(owner, counts, n_contexts)
    kind = np.clip(counts, 0, 3)
    followers = np.stack([np.bincount(owner[kind == k], minlength=n_contexts) for k in (1, 2, 3)])
    spectrum = np.bincount(np.minimum(counts, 5), minlength=6)[:5]
    return Order(counts[grams[where]], total[contexts[where]], followers[:, contexts[where]],
                 spectrum)


def count(train: bytes, test: bytes, orders: int) -> tuple[list[Order], list[Order], int]:
    """For orders 1, 2, ...: plain counts and Kneser-Ney's continuation counts of the training
    text at every byte of `test`; and how many different bytes there are."""
    text = np.frombuffer(train + test, np.uint8)
    n, size = len(text), len(train)
    alphabet, symbol = np.unique(text[:size], return_inverse=True)
    unknown = np.setdiff1d(text[size:], alphabet)
    assert not len(unknown), f"the training text has no byte {unknown[0]}"
    symbol = np.searchsorted(alphabet, text)
    where = np.arange(size, n)
    context = np.zeros(n, np.int64)  # number of the context of every position; order 1 has one
    plain, continuation, previous = [], [], None
    for order in range(1, orders + 2):  # one more: continuation counts come from the longer one
        known = np.arange(n) >= order - 1  # has so many bytes before it
        key = np.where(known, context * len(alphabet) + symbol, -1)
        different, gram = np.unique(key, return_inverse=True)
        trained = np.arange(n) < size
        counts = np.bincount(gram[known & trained], minlength=len(different))
        owner = np.zeros(len(different), np.int64)
        owner[gram] = context
        if previous is not None:  # each different longer gram is one new left neighbor
            short = np.zeros(len(different), np.int64)
            short[gram] = previous[0]
            seen = np.bincount(short[counts > 0], minlength=len(previous[2]))
            continuation.append(order_of(previous[0], previous[1], seen, previous[2], where))
        if order <= orders:
            plain.append(order_of(gram, context, counts, owner, where))
        previous = gram, context, owner
        context = np.concatenate([[0], gram[:-1]])  # gram before a position: its next context
    return plain, continuation, len(alphabet)


def add_constant(order: Order, a: float, n_bytes: int) -> np.ndarray:
    """Probability of every byte of the test text."""
    return (order.gram + a) / (order.context + a * n_bytes)


def interpolate(order: Order, shorter, discounts=(0.0, 0.0, 0.0), extra=0.0) -> np.ndarray:
    """(counts less `discounts` of 1, 2, 3 and more) + room * (the shorter order's probability),
    divided by what makes the sum 1. `extra` is added to the room: what Witten-Bell does."""
    taken = np.array([0.0, *discounts])[np.minimum(order.gram, 3)]
    room = np.asarray(discounts) @ order.followers + extra
    p = (order.gram - taken + room * shorter) / np.maximum(order.context + extra, 1e-9)
    return np.where(order.context > 0, p, shorter)


def chen_goodman(order: Order) -> np.ndarray:
    """The three discounts of modified Kneser-Ney, from how many grams occurred 1 to 4 times."""
    n1, n2, n3, n4 = order.counts_of_counts[1:].clip(1)
    y = n1 / (n1 + 2 * n2)
    return np.clip([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3],
                   0.05, [1, 2, 3])


def smoothed(kind: str, setting, order: Order, shorter, n_bytes: int) -> np.ndarray:
    """One order's probabilities, given the shorter order's."""
    if kind == "add-constant":  # has no use for the shorter one
        return add_constant(order, setting, n_bytes)
    if kind == "witten-bell":
        return interpolate(order, shorter, extra=setting * order.followers.sum(0))
    if kind == "kneser-ney":
        return interpolate(order, shorter, [setting] * 3)
    return interpolate(order, shorter, chen_goodman(order), setting or 0.0)


def probabilities(kind: str, setting, counted) -> list[np.ndarray]:
    """For orders 1, 2, ...: the probability of each byte of the test text."""
    plain, continuation, n_bytes = counted
    shorter, found = 1 / n_bytes, []
    for order, reduced in zip(plain, continuation):
        found.append(smoothed(kind, setting, order, shorter, n_bytes))
        if kind in ("add-constant", "witten-bell"):
            shorter = found[-1]
        else:  # below the top, contexts are counted
            shorter = smoothed(kind, setting, reduced, shorter, n_bytes)
    return found


def bits(probability: np.ndarray) -> float:
    """Mean bits per byte."""
    return float(-np.log2(probability).mean())


def scores(kind: str, setting, counted) -> list[float]:
    """Bits per byte of orders 1, 2, ..."""
    return [bits(p) for p in probabilities(kind, setting, counted)]


def tune(train: bytes, orders: int, share: float = 0.1) -> dict[str, list]:
    """The best number of every kind and order, on the last `share` of the training text."""
    cut = int(len(train) * (1 - share))
    counted = count(train[:cut], train[cut:], orders)
    best = {}
    for kind, grid in GRID.items():
        table = np.array([scores(kind, s, counted) for s in grid])  # (settings, orders)
        best[kind] = [grid[i] for i in table.argmin(0)]
    return best


def evaluate(train: bytes, test: bytes, tuned: dict[str, list]) -> list[dict]:
    """A row for each kind and order; `tuned[kind][order - 1]` is its number."""
    counted = count(train, test, max(map(len, tuned.values())))
    rows = []
    for kind, settings in tuned.items():
        found = {s: scores(kind, s, counted) for s in set(settings)}
        rows += [{"kind": kind, "order": i + 1, "setting": s,
                  "bits_per_byte": round(found[s][i], 4)} for i, s in enumerate(settings)]
    return rows


def part_of_best(train: bytes, test: bytes, best: dict) -> dict:
    """Bits per byte of the best table on a part of the held-out text."""
    counted = count(train, test[:SLICE.stop], best["order"])
    p = probabilities(best["kind"], best["setting"], counted)[-1]
    return {"bytes": [SLICE.start, SLICE.stop], "bits_per_byte": round(bits(p[SLICE]), 4)}


def main(orders: int, dry: bool) -> None:
    from skylar.data.held_out import train_text, val_text

    train, test = train_text().encode(), val_text().encode()
    rows = evaluate(train, test, tune(train, orders))
    best = {kind: min((r for r in rows if r["kind"] == kind), key=lambda r: r["bits_per_byte"])
            for kind in GRID}
    strongest = min(best.values(), key=lambda r: r["bits_per_byte"])
    for row in rows:
        stars = (row in best.values()) + (row is strongest)
        print(f"{row['kind']:20} {row['order']:3} {row['setting'] or '':>8} "
              f"{row['bits_per_byte']:8.4f} {'*' * stars}")
    if dry:
        return
    text = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in (("train", train), ("held_out", test))}
    result = {"unit": "bits per byte of the held-out plays",
              "order": "bytes in a gram: the one predicted and order - 1 before it",
              "text": text, "best": strongest, "best_of_kind": best,
              "slice": part_of_best(train, test, strongest), "rows": rows}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {OUT.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=int, default=12)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    main(args.orders, args.dry)
