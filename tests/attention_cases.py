"""Batches of packed documents and padding, and a layer that reads them with its cache in chunks;
for test_gqa.py and test_mla.py."""

import random

import torch

from skylar.layers.attention_backends import Positions, restarting_positions


def random_documents(rng: random.Random, B: int, T: int) -> list[list[int]]:
    "Each sequence its own cuts: packed documents, padding left or right, or nothing of it."
    rows = []
    for _ in range(B):
        cuts = sorted(rng.sample(range(1, T), rng.randint(0, min(3, T - 1))))
        rows.append([sum(t >= c for c in cuts) for t in range(T)])
    return rows


def placed(x, documents=None) -> Positions:
    "Positions of a whole batch, as a decoder makes them."
    if documents is None:
        return Positions.of(x)
    documents = torch.tensor(documents)
    return Positions(cache_position=torch.arange(x.shape[1]), document_ids=documents,
                     position_ids=restarting_positions(documents))


def in_chunks(layer, cache, x, whole: Positions, sizes, backend: str = "auto"):
    "What a decoder does with one layer and its cache."
    out, start, window = [], 0, getattr(layer.config, "window", None)
    for n in sizes:
        new = slice(start, start + n)
        queries, keys = whole[new], whole[:start + n]
        slots = cache.locate(queries, keys, new)
        inputs = layer.prepare(x[:, new], queries, slots.keys, backend, slots)
        out.append(layer(x[:, new], inputs, cache))
        cache.commit()
        start += n
        if window is not None and whole.document_ids is None:
            assert cache.keys.shape[2] == min(start, window.max_cached)
    assert start == x.shape[1]
    return torch.cat(out, dim=1)


def random_chunks(rng: random.Random, T: int) -> list[int]:
    sizes = []
    while sum(sizes) < T:
        sizes.append(min(rng.choice([1, 1, 2, 5, 11]), T - sum(sizes)))
    return sizes
