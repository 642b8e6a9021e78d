"""How many drafts of a module does a trained model accept, and how many of a table's?

    python bench/mtp_drafts.py                              # all arms and seeds
    python bench/mtp_drafts.py --seeds 2 --steps 50 --dry   # a look; writes no file

The model is assets/shakespeare (1.8 million parameters), which stays as it is. A module of
multi-token prediction is trained behind it, once as it should be and once with the next token
hidden from it (always token 0). Tables name the most frequent token after the last one or two of
the training plays. A draft is of token t + 2, made after token t + 1, and accepted where it is the
model's most probable token; teacher forced, on held-out windows of 64 tokens. Writes
bench/results/mtp_drafts.json.
"""

import argparse
from functools import cache

import torch
from common import record

from skylar.data.held_out import train_text, val_text
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.models.mtp import MTPConfig, MultiTokenPrediction, acceptance
from skylar.training.loss import MTPObjective
from skylar.utils.lesson import asset, mean_interval

LENGTH, BATCH, LR, WINDOWS = 64, 16, 3e-3, 512


class Blind(MultiTokenPrediction):
    """The next token is always token 0."""

    def step(self, model, k, hidden, tokens, *where, **options):
        return super().step(model, k, hidden, torch.zeros_like(tokens), *where, **options)


KINDS = {"module": MultiTokenPrediction, "module without the next token": Blind}


@cache
def opened() -> tuple:
    """The model, tokens of the training plays, held-out windows."""
    folder = asset("shakespeare")
    model, tokenizer = from_pretrained(folder).float(), load_tokenizer(folder)
    model.requires_grad_(False)
    train, val = (torch.tensor(tokenizer.encode(text())) for text in (train_text, val_text))
    starts = torch.linspace(0, len(val) - LENGTH - 1, WINDOWS).long()
    return model, train, windows_of(val, starts)


def windows_of(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return ids[starts[:, None] + torch.arange(LENGTH + 1)]


def batch_of(windows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def after(ids: torch.Tensor, order: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts of `order` tokens as numbers, and the token after each."""
    last = ids.shape[-1] - order
    contexts = sum(ids[..., i:last + i] * vocab_size ** (order - 1 - i) for i in range(order))
    return contexts, ids[..., order:]


def table(order: int, vocab_size: int) -> torch.Tensor:
    """The most frequent token after each context."""
    contexts, following = after(opened()[1], order, vocab_size)
    codes, counts = (contexts * vocab_size + following).unique(return_counts=True)
    best = torch.zeros(vocab_size**order, dtype=torch.long)
    key = counts * vocab_size + codes % vocab_size
    return best.scatter_reduce(0, codes // vocab_size, key, "amax") % vocab_size


@torch.no_grad()
def table_rate(order: int) -> float:
    model, _, windows = opened()
    V, choice = model.config.vocab_size, model(windows[:, :-1]).argmax(-1)
    contexts, _ = after(windows, order, V)
    drafts, choice = table(order, V)[contexts][:, 2 - order:], choice[:, 1:]
    return (drafts == choice).float().mean().item()


def train(kind: type, seed: int, steps: int) -> float:
    """Share of accepted drafts after `steps` steps."""
    model, ids, windows = opened()
    torch.manual_seed(seed)
    objective = MTPObjective(model, MTPConfig(weight=1.0))
    objective.mtp = kind(MTPConfig(), model.decoder_config)
    optimizer = torch.optim.AdamW(objective.mtp.parameters(), LR, betas=(0.9, 0.95), fused=True)
    objective.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        out = objective(batch_of(windows_of(ids, torch.randint(len(ids) - LENGTH - 1, (BATCH,)))))
        (out.loss_sum / out.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
    ((accepted, drafted),) = acceptance(model, objective.eval().mtp, batch_of(windows))
    return (accepted / drafted).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"arm": f"table, {n} token{'s' * (n > 1)}", "accepted": [round(table_rate(n), 4)]}
            for n in (1, 2)]
    for name, kind in KINDS.items():
        rates = [round(train(kind, seed, args.steps), 4) for seed in range(args.seeds)]
        rows.append({"arm": name, "accepted": rates, "interval": round(mean_interval(rates)[1], 4)})
    if args.dry:
        return print(*rows, sep="\n")
    record("mtp_drafts", rows, seeds=args.seeds, steps=args.steps, windows=WINDOWS)


if __name__ == "__main__":
    main()
