"""A corpus and a tokenizer small enough to say what the shards must hold, byte by byte."""

import hashlib

import numpy as np

from skylar.data.shards import write_shards


class Bytes:
    """The smallest tokenizer: a token is a byte; two more begin and end a document."""

    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


def corpus(n=40, seed=0):
    """Documents of many lengths, among them an empty one and a one-letter one."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdé \n"), size=rng.integers(2, 90))) for _ in range(n)]
    texts[3], texts[7] = "", "x"
    return texts


def write(texts, out, **kwargs):
    return write_shards(texts, Bytes(), out, progress=False, **kwargs)


def stream(texts):
    """What the shards must hold, by the definition."""
    return [t for text in texts for t in (256, *text.encode(), 257)]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The same bytes with one bit flipped, one byte changed, the end or a few bytes gone, or
    a stretch repeated."""
    bad, at = bytearray(data), int(rng.integers(len(data)))
    kind = rng.integers(5)
    if kind == 0:
        bad[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        bad[at] = int(rng.integers(256))
    elif kind == 2:
        del bad[at:]
    elif kind == 3:
        del bad[at : at + 1 + int(rng.integers(9))]
    else:
        bad[at:at] = bad[max(0, at - 9) : at]
    return bytes(bad)
