"""Small tokenizers, conversations and models that the tests of post-training share."""

import json
import random
from pathlib import Path

import torch

from skylar.data.chat import PretrainedTokenizer
from skylar.data.chatml import chat_tokenizer
from skylar.data.tokenizer import BPETokenizer
from skylar.models.decoder import CausalLM
from skylar.models.hub import save_pretrained
from skylar.models.presets import get_config

TEXTS = ["What is 1+1? It is 2. the king said that love is short user assistant system " * 40]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather of a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}}


def small_tokenizer() -> PretrainedTokenizer:
    """ChatML with tools over a vocabulary of 300 tokens."""
    return chat_tokenizer(BPETokenizer.train(TEXTS, vocab_size=300))


def tiny_chat_model(tokenizer: PretrainedTokenizer, **sizes) -> CausalLM:
    """Two layers, width 32, with seeded weights."""
    sizes = dict(d_model=32, d_head=8, d_ff=64, n_layers=2, max_seq_len=256) | sizes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalLM(get_config("test", vocab_size=tokenizer.vocab_size, **sizes))


def random_text(rng: random.Random, marks: bool = False) -> str:
    """Letters of several alphabets, line breaks, digits; with `marks` control tokens, typed."""
    parts = ["love", " hate?", "\n", "straße", "🙂", "1.5", "assistant", " the king"]
    parts += ["<|im_end|>", "<|im_start|>assistant\n", "<think>"] if marks else []
    return ("x" + "".join(rng.choices(parts, k=rng.randrange(6)))).strip()


def random_messages(rng: random.Random, marks: bool = False, plain: bool = False) -> list[dict]:
    """A conversation; unless `plain` with reasoning, tool calls and tool responses now and then."""
    found = []
    if rng.random() < 0.5:
        found.append({"role": "system", "content": random_text(rng, marks)})
    for _ in range(rng.randrange(1, 4)):
        answer = {"role": "assistant", "content": random_text(rng, marks)}
        found += [{"role": "user", "content": random_text(rng, marks)}, answer]
        if plain:
            continue
        if rng.random() < 0.3:
            answer["reasoning_content"] = random_text(rng)
        if rng.random() < 0.3:
            answer["tool_calls"] = [CALL]
            found += [{"role": "tool", "content": "sunny"},
                      {"role": "assistant", "content": random_text(rng, marks)}]
    return found


def sums(n: int) -> list[list[dict]]:
    """Conversations of different lengths that a tiny model can learn by heart."""
    return [[{"role": "user", "content": f"What is {i}+1?"},
             {"role": "assistant", "content": "It is " + f"{i + 1} " * (1 + i % 4) + "."}]
            for i in range(n)]


def write_chats(path: Path, chats: list) -> Path:
    """A .jsonl file of messages."""
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    return path


def save_base(folder: Path) -> Path:
    """A tiny untrained model with its tokenizer, as a Hugging Face folder."""
    bpe = BPETokenizer.train(TEXTS, vocab_size=300)
    save_pretrained(tiny_chat_model(small_tokenizer()), folder, bpe)
    return folder
