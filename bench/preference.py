"""Which preference loss teaches a small model most about spelling, and what does it cost?

    python bench/preference.py                                  # about five minutes on one core
    python bench/preference.py --seeds 1 --steps 20 --prompts 60 --dry   # a look; writes no file

The model is assets/shakespeare. It writes `SAMPLES` speeches to each prompt (a speaker and the
first words of a speech of the training plays); a list of all words of these plays ranks them; the
best and the worst are a pair. All arms see the same pairs in the same order, `BATCH` a step, under
bfloat16 autocast. The baseline trains on the chosen answers with cross-entropy (best-of-n
fine-tuning). Each arm's learning rate is the one with the most known words on prompts that are
used for nothing else, with seed 0; then the other seeds are run with it. Metrics are of new
speeches to prompts of the held-out plays, at temperature 1, in float32: share of known words,
tokens, share that ended, share of different pairs of words, divergence from the base (mean of
log π - log π_base of a speech, nats). Writes bench/results/preference.json.
"""

import argparse
import copy
import random
import re
from functools import cache
from itertools import groupby

import torch
from common import record

from skylar.data.held_out import train_text, val_text
from skylar.data.pairs import (
    ExampleLoader,
    Pair,
    answer_rows,
    graded_answers,
    graded_batch,
    pair_batch,
)
from skylar.inference.generate import generate
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.preference import (
    PreferenceConfig,
    PreferenceObjective,
    best_and_worst,
    sequence_logprobs,
    with_reference,
)
from skylar.utils.lesson import asset, mean_interval

SAMPLES, LENGTH, BATCH, EVAL_PROMPTS = 8, 48, 16, 200
RATES = (1e-4, 3e-4)
ARMS = {  # settings as their authors recommend, where they do
    "best of n": None,
    "dpo": PreferenceConfig(beta=0.1),
    "ipo": PreferenceConfig(loss="ipo", beta=1.0),
    "simpo": PreferenceConfig(loss="simpo", beta=2.0, gamma=1.0),
    "orpo": PreferenceConfig(loss="orpo", beta=0.1),
    "kto": PreferenceConfig(loss="kto", beta=0.1),
}


@cache
def opened() -> tuple:
    """The base model, its tokenizer, tokens that end a speech, words of the training plays."""
    folder = asset("shakespeare")
    tokenizer = load_tokenizer(folder)
    ends = [i for i in range(tokenizer.vocab_size) if "\n\n" in tokenizer.decode([i])]
    known = frozenset(re.findall(r"[a-z']+", train_text().lower()))
    return from_pretrained(folder).float(), tokenizer, ends + list(tokenizer.eos_token_ids), known


def prompts_of(text: str, n: int, seed: int) -> list[list[int]]:
    """`n` different beginnings of speeches: the speaker and two to four words."""
    _, tokenizer, _, _ = opened()
    speeches = re.findall(r"\n\n([A-Z][A-Z ]{2,12}):\n(.+?)(?=\n\n)", text, re.S)
    speeches = [(name, body.split(" ")) for name, body in speeches if len(body.split(" ")) > 6]
    rng = random.Random(seed)
    chosen = rng.sample(speeches, n)
    texts = [f"{name}:\n{' '.join(words[:rng.randrange(2, 5)])}" for name, words in chosen]
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


def words_of(answer: list[int]) -> list[str]:
    """Whole words of an answer: the first may complete one of the prompt."""
    return re.findall(r"[a-z']+", opened()[1].decode(answer).lower())[1:]


def score(answer: list[int]) -> float:
    words = words_of(answer)
    return sum(w in opened()[3] for w in words) / max(len(words), 1)


@torch.no_grad()
def answers_to(model, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """One sample for each prompt, in batches of prompts of one length."""
    _, _, ends, _ = opened()
    generator = torch.Generator().manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[int]] = [[] for _ in prompts]
    for size, group in groupby(order, key=lambda i: len(prompts[i])):
        group = list(group)
        for part in (group[i:i + 64] for i in range(0, len(group), 64)):
            ids = torch.tensor([prompts[i] for i in part])
            new = generate(model, ids, LENGTH, 1.0, generator=generator, eos_token_id=ends,
                           context="stop")[:, size:].tolist()
            for i, row in zip(part, new):
                stop = next((n for n, token in enumerate(row) if token in ends), len(row))
                found[i] = row[:stop + 1]
    return found


def make_pairs(n: int) -> list[Pair]:
    """Pairs of the base model's own answers, made once."""
    prompts = prompts_of(train_text(), n, seed=0)
    samples = answers_to(opened()[0], [p for p in prompts for _ in range(SAMPLES)], seed=0)
    found = []
    for n, prompt in enumerate(prompts):
        answers = samples[n * SAMPLES:(n + 1) * SAMPLES]
        answers = [a for a in answers if len(words_of(a)) >= 3]
        if len(answers) > 1:
            found.append(best_and_worst(prompt, answers, list(map(score, answers))))
    return [pair for pair in found if pair]


class BestOfN(torch.nn.Module):
    """Cross-entropy of the chosen answers, summed; counted in tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        rows = {"input_ids": batch["chosen_input_ids"], "labels": batch["chosen_labels"]}
        return -sequence_logprobs(self.model, rows).sum(), (rows["labels"] != -100).sum()


def objective_of(arm: str, model, pairs: list[Pair], seed: int) -> tuple:
    """The loss and its batches, `BATCH` pairs each."""
    config = ARMS[arm]
    if config is None:
        return BestOfN(model), ExampleLoader(pairs, pair_batch, BATCH, seed=seed)
    if config.loss == "kto":
        graded = with_reference(graded_answers(pairs), opened()[0], graded_batch, 32)
        return (PreferenceObjective(model, None, config),
                ExampleLoader(graded, graded_batch, 2 * BATCH, seed=seed))
    stored = with_reference(pairs, opened()[0], pair_batch, 32)
    return (PreferenceObjective(model, None, config),
            ExampleLoader(stored, pair_batch, BATCH, seed=seed))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def train(arm: str, pairs: list[Pair], lr: float, steps: int, seed: int):
    """The trained model."""
    torch.manual_seed(seed)
    model = copy.deepcopy(opened()[0]).requires_grad_()
    with autocast():
        objective, loader = objective_of(arm, model.train(), pairs, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in zip(range(steps), loader):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        with autocast():
            total, n, *_ = objective(batch)
        optimizer.zero_grad()
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def measure(model, prompts: list[list[int]], seed: int) -> dict[str, float]:
    """Of one new speech to each prompt."""
    base, _, ends, _ = opened()
    answers = answers_to(model, prompts, 1000 + seed)
    rows = answer_rows(prompts, answers)
    kl = sequence_logprobs(model, rows) - sequence_logprobs(base, rows)
    words = [words_of(a) for a in answers]
    bigrams = [pair for w in words for pair in zip(w, w[1:])]
    flat = [w for row in words for w in row]
    return {
        "known_words": sum(w in opened()[3] for w in flat) / max(len(flat), 1),
        "tokens": sum(map(len, answers)) / len(answers),
        "ended": sum(a[-1] in ends for a in answers) / len(answers),
        "different_bigrams": len(set(bigrams)) / max(len(bigrams), 1),
        "kl": kl.mean().item(),
    }


def summary(rows: list[dict], arm: str) -> dict[str, list[float]]:
    """Mean and 95% interval over seeds of each metric."""
    of_arm = [row for row in rows if row["arm"] == arm and row["final"]]
    names = ("known_words", "tokens", "ended", "different_bigrams", "kl")
    found = {}
    for name in names:
        values = [row[name] for row in of_arm]
        found[name] = list(mean_interval(values)) if len(values) > 1 else [values[0], 0.0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = make_pairs(args.prompts)
    print(f"{len(pairs)} pairs", flush=True)
    held_out = prompts_of(val_text(), min(EVAL_PROMPTS, args.prompts), seed=1)
    tuning = prompts_of(train_text(), min(100, args.prompts), seed=2)
    rows, rates = [], {}
    for seed in range(args.seeds):
        row = measure(opened()[0], held_out, seed)
        rows.append({"arm": "base", "seed": seed, "final": True, **row})
    for arm in ARMS:
        tried, first = {}, {}
        for lr in RATES:
            first[lr] = train(arm, pairs, lr, args.steps, seed=0)
            found = measure(first[lr], tuning, seed=0)
            tried[lr] = found["known_words"]
            rows.append({"arm": arm, "seed": 0, "lr": lr, "final": False, **found})
        rates[arm] = max(tried, key=tried.get)
        for seed in range(args.seeds):
            model = (train(arm, pairs, rates[arm], args.steps, seed) if seed
                     else first[rates[arm]])
            rows.append({"arm": arm, "seed": seed, "lr": rates[arm], "final": True,
                         **measure(model, held_out, seed)})
            print(rows[-1], flush=True)
    best = {arm: summary(rows, arm) for arm in ("base", *ARMS)}
    if args.dry:
        return print(best)
    lengths = [[len(p.chosen), len(p.rejected)] for p in pairs]
    record("preference", rows, best=best, rates=rates, pairs=len(pairs), steps=args.steps,
           seeds=args.seeds, mean_tokens=torch.tensor(lengths).float().mean(0).tolist())


if __name__ == "__main__":
    main()
