"""PPO on a model of 6.9 million parameters: lines of ten syllables, with and without a price of KL.

The `test` preset with SmolLM2's tokenizer learns the plays; then PPO asks for verse: the score of
a text is the share of its whole lines with 9 to 11 syllables (groups of vowels), 0 without a
whole line. Prompts are the beginnings of lines of the plays; what is reported is measured on
prompts from the four plays that nobody trained on, with one sampled text each:

    reward          mean score
    best_of_4       of the model before PPO, the best of four texts: the baseline
    kl              nats a text, from the model before PPO
    bits_per_byte   of the beginnings of the held-out plays: what the model has forgotten
    distinct        different pairs of neighboring words, of all: 1 is no repetition

The same measures of Shakespeare's own lines say what there is to reach. bench/results/ppo.json.

    python bench/ppo.py                                             # about 25 minutes on one core
    python bench/ppo.py --seeds 1 --warmup 50 --updates 10 --dry    # a look; writes no file
"""

import argparse
import copy
import re
import statistics

import torch
from common import record

from skylar.data.held_out import text_bits_per_byte, train_plays, val_plays
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.hub import load_tokenizer
from skylar.models.presets import get_config
from skylar.posttrain.ppo import PPOConfig, PPOObjective, ppo_preparer
from skylar.posttrain.preference import token_logprobs
from skylar.posttrain.rollout import Example, RolloutConfig, RolloutLoader, reading, scored_rollouts
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import mean_interval

LENGTH, BATCH, NEW, TEXTS = 128, 16, 40, 256
HELD_OUT = 20_000  # characters of each play
ARMS = {"no price": 0.0, "price 0.02": 0.02}
MEASURES = ("reward", "kl", "bits_per_byte", "distinct")


def syllables(line: str) -> int:
    """Groups of vowels; an e at the end of a word is silent, unless it is the only one."""
    words = re.findall(r"[a-z']+", line.lower())
    return sum(max(1, len(re.findall(r"[aeiouy]+", re.sub(r"e$", "", word)))) for word in words)


def score_of(text: str) -> float:
    """The share of whole lines that have 9 to 11 syllables."""
    lines = [line for line in text.split("\n")[:-1] if line.strip()]
    return statistics.fmean(9 <= syllables(line) <= 11 for line in lines) if lines else 0.0


class Verse:
    """A task: prompts are two lines of the plays."""

    def __init__(self, plays: list[str], n: int, seed: int):
        text = "\n".join(plays)
        starts = [m.end() for m in re.finditer("\n", text)][:-40]
        chosen = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:n]
        self.examples = [self.example(text, starts[i]) for i in chosen.tolist()]

    @staticmethod
    def example(text: str, start: int) -> Example:
        first, second, rest = text[start:start + 2_000].split("\n", 2)
        return Example(f"{first}\n{second}\n", rest)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def score(self, text: str, example: Example) -> float:
        return score_of(text)


def trained(objective, loader, steps: int, lr: float, seed: int) -> list[dict]:
    """Rows of metrics of a run with the Trainer."""
    return Trainer(
        objective, loader, TrainConfig(steps=steps, log_every=1, eval_every=0, save_every=0,
                                       device="cpu", seed=seed),
        optimizer=AdamWConfig(lr=lr, weight_decay=0.0),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=steps // 10), quiet=True).train()


class Windows:
    """Endless random windows of the plays, for the Trainer."""

    def __init__(self, ids: torch.Tensor, seed: int):
        self.ids, self.generator = ids, torch.Generator().manual_seed(seed)

    def __iter__(self):
        while True:
            starts = torch.randint(len(self.ids) - LENGTH - 1, (BATCH, 1),
                                   generator=self.generator)
            found = self.ids[starts + torch.arange(LENGTH + 1)]
            yield {"input_ids": found[:, :-1], "labels": found[:, 1:]}


def before(tokenizer, seed: int, steps: int) -> CausalLM:
    """A model of the plays."""
    torch.manual_seed(seed)
    model = CausalLM(get_config("test", vocab_size=tokenizer.vocab_size, dropout=0.0))
    ids = torch.tensor(tokenizer.encode("\n".join(train_plays())))
    trained(NextTokenObjective(model), Windows(ids, seed), steps, 1e-3, seed)
    return model


class Start:
    """The tokenizer for `text_bits_per_byte`: it has no `bos_id`, but an end of text."""

    def __init__(self, tokenizer):
        self.encode, self.bos_id = tokenizer.encode, tokenizer.eos_token_ids[0]


def distinct(texts: list[str]) -> float:
    """Different pairs of neighboring words, of all."""
    pairs = [pair for words in map(str.split, texts) for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs)


def sampled(model, tokenizer, task: Verse, seed: int, n: int = 1) -> dict:
    """`scored_rollouts` of all of the task's prompts, n texts each."""
    config = RolloutConfig(n=n, max_new_tokens=NEW, chat=False)
    uniforms = torch.rand(len(task) * n, NEW, generator=torch.Generator().manual_seed(seed))
    return scored_rollouts(model, tokenizer, task, task.examples, config,
                           tokenizer.eos_token_ids, uniforms)


def measured(model, reference, tokenizer, task: Verse, seed: int) -> dict[str, float]:
    """MEASURES of one model."""
    batch = sampled(model, tokenizer, task, seed)
    with reading(model), reading(reference):
        kl = token_logprobs(model, batch) - token_logprobs(reference, batch)
    mask = batch["labels"] != -100
    texts = [tokenizer.decode(ids[kept].tolist()) for ids, kept in zip(batch["labels"], mask)]
    return {"reward": batch["rewards"].mean().item(), "kl": (kl * mask).sum(1).mean().item(),
            "bits_per_byte": text_bits_per_byte(
                model, Start(tokenizer), [play[:HELD_OUT] for play in val_plays()]),
            "distinct": distinct(texts)}


def run(tokenizer, seed: int, args) -> dict[str, dict]:
    """Measures before, and after each arm."""
    start = before(tokenizer, seed, args.warmup)
    task, new = Verse(train_plays(), 20_000, seed), Verse(val_plays(), TEXTS, 1_000 + seed)
    found = {"before": measured(start, start, tokenizer, new, seed)}
    four = sampled(start, tokenizer, new, 5_000 + seed, n=4)["rewards"].view(-1, 4)
    found["before"]["best_of_4"] = four.amax(1).mean().item()
    print(seed, "before", found["before"], flush=True)
    for arm, price in ARMS.items():
        model = copy.deepcopy(start)
        objective = PPOObjective(model, PPOConfig(kl_coef=price))
        rollouts = RolloutConfig(prompts=32, n=1, max_new_tokens=NEW, iterations=2, chat=False,
                                 seed=seed)
        loader = RolloutLoader(model, tokenizer, task, rollouts,
                               prepare=ppo_preparer(objective, start))
        rows = trained(objective, loader, args.updates, args.lr, seed)
        found[arm] = measured(model, start, tokenizer, new, seed)
        found[arm]["curve"] = [round(row["reward"], 3) for row in rows[::10]]
        print(seed, arm, found[arm], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=400, help="steps of pretraining")
    parser.add_argument("--updates", type=int, default=120, help="of PPO, two a batch")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    tokenizer = load_tokenizer("smollm2")
    runs = [run(tokenizer, seed, args) for seed in range(args.seeds)]
    rows = []
    for arm in ("before", *ARMS):
        row = {"arm": arm}
        for key in (*MEASURES, "best_of_4"):
            values = [found[arm][key] for found in runs if key in found[arm]]
            if values:
                row[key], row[f"{key}_half_width"] = mean_interval(values)
        rows.append(row | {"rewards": [found[arm]["reward"] for found in runs]})
    own = [e.entry[:150] for e in Verse(val_plays(), TEXTS, 1_000).examples]
    more = {"plays": {"reward": statistics.fmean(map(score_of, own)), "distinct": distinct(own)},
            "curves": {arm: [found[arm]["curve"] for found in runs] for arm in ARMS}}
    if args.dry:
        return print(*rows, more, sep="\n")
    config = get_config("test", vocab_size=tokenizer.vocab_size, dropout=0.0)
    record("ppo", rows, **more, parameters=count_parameters(config), texts=TEXTS, tokens=NEW,
           **{key: getattr(args, key) for key in ("seeds", "warmup", "updates", "lr")})


if __name__ == "__main__":
    main()
