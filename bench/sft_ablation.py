"""What the loss mask and the weight of the ends do, on dialogues of Shakespeare's plays.

    python bench/sft_ablation.py                      # all arms, three seeds
    python bench/sft_ablation.py --arms "weight 1"    # one of them; the file keeps the others
    python bench/sft_ablation.py --steps 20 --dry     # a look; writes no file

The course's small Shakespeare model is fine-tuned on two-speaker dialogues of the training plays.
Arms differ in one thing from "answers, weight 2": every token is a target, or the ends of answers
count once. Each seed orders the rows; all arms see the same rows. Measured on dialogues of the
held-out plays: bits per byte of the answers, without the end mark, and the share of sampled
answers that end by themselves within 100 tokens. The baseline is the base model on the same bytes,
the dialogue written as in a play. Writes bench/results/sft_ablation.json.
"""

import argparse
import copy
import itertools
import json
import math
import re

import torch
import torch.nn.functional as F
from common import ROOT, write

from skylar.data.chatml import BadRows, ConversationLoader, chat_tokenizer, encode_conversation
from skylar.data.dialogues import play_dialogues
from skylar.data.held_out import train_plays, val_plays
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.battery import replies
from skylar.posttrain.sft import SFTObjective

BASE = ROOT / "assets" / "shakespeare"
BATCH, LENGTH, LR, N_VAL = 8, 256, 5e-4, 160
ARMS = {
    "answers, weight 2": {"end_weight": 2.0},
    "weight 1": {"end_weight": 1.0},
    "every token": {"end_weight": 2.0, "every_token": True},
}


def held_out(tokenizer) -> list:
    """Two-message dialogues that leave room for 100 tokens of an answer."""
    found = [c for c in play_dialogues(val_plays(), max_turns=2)
             if len(tokenizer.chat(c.messages)) <= 150]
    return found[:: max(1, len(found) // N_VAL)][:N_VAL]


def as_play(tokenizer, conversation) -> tuple[list, list]:
    """Ids and shifted labels of a dialogue in the format of the plays."""
    names = re.fullmatch(r"You are (.+)\. (.+) speaks to you\.",
                         conversation.messages[0]["content"])
    user, assistant = names[2], names[1]
    question, answer = (m["content"] for m in conversation.messages[1:])
    prompt = tokenizer.prefix_ids + tokenizer.encode(f"{user}:\n{question}\n\n{assistant}:\n")
    answer = tokenizer.encode(answer)
    return (prompt + answer)[:-1], ([-100] * len(prompt) + answer)[1:]


def as_chat(tokenizer, conversation) -> tuple[list, list]:
    """The same in ChatML; the end mark is no target, so that both have the same bytes."""
    row = encode_conversation(tokenizer, conversation.messages)
    ends = tokenizer.eos_token_ids
    return list(row.ids), [-100 if label in ends else label for label in row.labels]


@torch.no_grad()
def answer_bits(model, tokenizer, conversations, form) -> float:
    nats = n_bytes = 0
    for conversation in conversations:
        ids, labels = (torch.tensor([x]) for x in form(tokenizer, conversation))
        logits = model(ids).flatten(0, 1)
        nats += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
        n_bytes += len(conversation.messages[-1]["content"].encode())
    return nats / math.log(2) / n_bytes


def all_targets(batch: dict) -> dict:
    """Every next token of the same conversation is a target; ends keep their weight."""
    ids, documents = batch["input_ids"], batch["document_ids"]
    labels = batch["labels"].clone()
    inside = (documents[:, :-1] == documents[:, 1:]) & (labels[:, :-1] == -100)
    # padding is a document of its own, of zeros
    inside &= (batch["weights"].flip(1).cumsum(1).flip(1) > 0)[:, :-1]
    labels[:, :-1][inside] = ids[:, 1:][inside]
    weights = torch.where((labels != -100) & (batch["weights"] == 0), 1.0, batch["weights"])
    return {**batch, "labels": labels, "weights": weights}


def train(base, tokenizer, dialogues, seed: int, steps: int, end_weight: float,
          every_token: bool = False):
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    objective = SFTObjective(model).train()
    loader = ConversationLoader(dialogues, tokenizer, BATCH, LENGTH, seed=seed,
                                end_weight=end_weight, bad=BadRows("skip"))
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in zip(range(steps), loader):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.05 * steps), 1) * (1 - step / steps)
        output = objective(all_targets(batch) if every_token else batch)
        (output.loss_sum / output.n_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    base = from_pretrained(BASE, dtype=torch.float32)
    tokenizer = chat_tokenizer(load_tokenizer(BASE))
    dialogues, val = play_dialogues(train_plays()), held_out(tokenizer)
    baseline = answer_bits(base, tokenizer, val, as_play)
    untrained = answer_bits(base, tokenizer, val, as_chat)
    print(f"base: {baseline:.4f} bits per byte as a play, {untrained:.4f} as a chat")
    path = ROOT / "bench" / "results" / "sft_ablation.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["arm"] not in args.arms]
    prompts = [c.messages[:-1] for c in val]
    for seed, arm in itertools.product(range(args.seeds), args.arms):
        model = train(base, tokenizer, dialogues, seed, args.steps, **ARMS[arm])
        found = replies(model, tokenizer, prompts, 100, temperature=0.8, seed=seed)
        lengths = [len(tokenizer.encode(r.text)) for r in found]
        rows.append({
            "arm": arm, "seed": seed, "steps": args.steps,
            "bits": answer_bits(model, tokenizer, val, as_chat),
            "stops": sum(r.stopped for r in found) / len(found),
            "mean_tokens": sum(lengths) / len(lengths)})
        print(rows[-1], flush=True)
        if not args.dry:
            write("sft_ablation", rows, baseline=baseline, untrained=untrained,
                  held_out=len(val), unit="bits per byte of held-out answers")


if __name__ == "__main__":
    main()
