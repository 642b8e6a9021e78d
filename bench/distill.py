"""What should a student learn from: the next token, a teacher's distributions, whose texts?

    python bench/distill.py                          # teacher: the course's Shakespeare model
    python bench/distill.py --teacher smollm2 --batch 4 --warmup 100 --steps 40 --arms \
        "next token" "forward KL" "own texts, reverse KL"    # it teaches a model of 6.9 million
    python bench/distill.py --seeds 2 --steps 20 --warmup 40 --dry    # a look; writes no file

For each seed a student is trained on next tokens; then each arm goes on from there for as many
updates. Arms that read the plays see the same windows. Judged by bits per byte of the beginnings
(20,000 characters each) of the four held-out plays, and by the teacher's negative log-probability
of texts that the student samples.
The file keeps the rows of the other teacher. Writes bench/results/distill.json.
"""

import argparse
import copy
import json
from dataclasses import dataclass

import torch
from common import ROOT, record

from skylar.data.held_out import text_bits_per_byte, train_text, val_plays
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.models.presets import get_config
from skylar.posttrain.distill import DistillConfig, DistillObjective
from skylar.posttrain.rollout import rollout
from skylar.training.loss import NextTokenObjective, linear_cross_entropy
from skylar.utils.lesson import asset

LENGTH, LR = 128, 1e-3
HELD_OUT = 20_000  # characters of each play
NEW = 32  # tokens of a sampled text
ARMS: dict[str, tuple[DistillConfig | None, str]] = {  # loss (None: next token), who writes
    "next token": (None, "plays"),
    "forward KL": (DistillConfig(), "plays"),
    "JSD": (DistillConfig(divergence="jsd"), "plays"),
    "reverse KL": (DistillConfig(divergence="reverse_kl"), "plays"),
    "teacher's texts": (None, "teacher"),
    "own texts, reverse KL": (DistillConfig(divergence="reverse_kl"), "student"),
}


@dataclass
class Course:
    """The teacher, its tokenizer, the plays and how a student is made."""

    name: str
    teacher: CausalLM
    tokenizer: object
    ids: torch.Tensor
    evaluated: list[str]
    batch: int  # windows a step, of LENGTH tokens; about as many tokens in sampled texts

    @classmethod
    def open(cls, name: str, batch: int = 8) -> "Course":
        where = asset("shakespeare") if name == "shakespeare" else name
        tokenizer = load_tokenizer(where)
        part = train_text() if name == "shakespeare" else train_text()[:2_000_000]
        plays = [play[:HELD_OUT] for play in val_plays()]
        return cls(name, from_pretrained(where).float().requires_grad_(False), tokenizer,
                   torch.tensor(tokenizer.encode(part)), plays, batch)

    def student(self, seed: int) -> CausalLM:
        torch.manual_seed(seed)
        V = self.teacher.decoder_config.vocab_size
        small = dict(d_model=64, n_heads=4, n_kv_heads=2, d_head=16, d_ff=160, n_layers=2,
                     max_seq_len=256) if self.name == "shakespeare" else {}
        return CausalLM(get_config("test", family="qwen3", vocab_size=V, dropout=0.0, **small))

    @property
    def start(self) -> int:
        found = self.tokenizer.bos_id
        return self.tokenizer.eos_token_ids[0] if found is None else found

    def prompts(self, generator: torch.Generator, n: int) -> list[list[int]]:
        """Four tokens of the plays each."""
        first = torch.randint(len(self.ids) - 4, (n,), generator=generator).tolist()
        return [[self.start, *self.ids[i:i + 4].tolist()] for i in first]

    def window(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        starts = torch.randint(len(self.ids) - LENGTH - 1, (self.batch, 1), generator=generator)
        found = self.ids[starts + torch.arange(LENGTH + 1)]
        return {"input_ids": found[:, :-1], "labels": found[:, 1:]}

    def written(self, model: CausalLM, generator: torch.Generator, seed: int) -> dict:
        found = rollout(model, self.prompts(generator, LENGTH * self.batch // NEW), 1, NEW,
                        eos_token_id=self.tokenizer.eos_token_ids,
                        generator=torch.Generator().manual_seed(seed)).batch()
        return {key: found[key] for key in ("input_ids", "labels")}


def train(objective, batches, steps: int) -> None:
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, betas=(0.9, 0.95), fused=True)
    objective.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), 1.0)
        out = objective(batches(step))
        (out.loss_sum / out.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def teacher_nats(course: Course, model: CausalLM) -> float:
    """Mean negative log-probability of the student's tokens under the teacher."""
    total = n = 0
    for seed in range(8):
        batch = course.written(model, torch.Generator().manual_seed(1000 + seed), 2000 + seed)
        loss, count = linear_cross_entropy(
            course.teacher.model(batch["input_ids"]).flatten(0, 1),
            course.teacher.lm_head.weight, batch["labels"].flatten())
        total, n = total + loss.item(), n + int(count)
    return total / n


def run(course: Course, arms: list[str], seed: int, warmup: int, steps: int) -> dict[str, dict]:
    begun = course.student(seed)
    generator = torch.Generator().manual_seed(seed)
    train(NextTokenObjective(begun), lambda step: course.window(generator), warmup)
    found = {}
    for arm in arms:
        config, writer = ARMS[arm]
        model, generator = copy.deepcopy(begun), torch.Generator().manual_seed(100 + seed)
        objective = NextTokenObjective(model) if config is None else (
            DistillObjective(model, course.teacher, config))
        author = {"teacher": course.teacher, "student": model}.get(writer)

        def batches(step, author=author, generator=generator):
            if author is None:
                return course.window(generator)
            return course.written(author, generator, 10_000 * seed + step)

        train(objective, batches, steps)
        model.eval()
        found[arm] = {"bits_per_byte": text_bits_per_byte(
            model, Start(course), course.evaluated), "teacher_nats": teacher_nats(course, model)}
        print(seed, arm, found[arm], flush=True)
    return found


class Start:
    """The tokenizer, with a first token where it has no `bos_id`."""

    def __init__(self, course: Course):
        self.encode, self.bos_id = course.tokenizer.encode, course.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="shakespeare", choices=("shakespeare", "smollm2"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="windows of 128 tokens a step")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    course = Course.open(args.teacher, args.batch)
    runs = [run(course, args.arms, seed, args.warmup, args.steps) for seed in range(args.seeds)]
    rows = [{"teacher": args.teacher, "arm": arm, "warmup": args.warmup, "steps": args.steps,
             "tokens_a_step": LENGTH * args.batch,
             "student_parameters": count_parameters(course.student(0).config),
             **{key: [round(found[arm][key], 4) for found in runs]
                for key in ("bits_per_byte", "teacher_nats")}} for arm in args.arms]
    if args.dry:
        return print(*rows, sep="\n")
    path = ROOT / "bench" / "results" / "distill.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    record("distill", [r for r in old if r["teacher"] != args.teacher] + rows,
           held_out_bytes=4 * HELD_OUT)


if __name__ == "__main__":
    main()
