"""`GPT2Config` is Hugging Face's GPT-2: same weights in, same logits, loss and gradients out."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.gpt2 import GPT2Config

transformers = pytest.importorskip("transformers", reason="transformers comes with skylar[lab]")
from hf_gpt2 import from_hf  # noqa: E402


def random_args(seed: int) -> dict:
    "Fields of `GPT2Config` that Hugging Face can express: d_model = n_heads * d_head."
    rng = random.Random(seed)
    n_heads = rng.choice([1, 2, 3, 5, 7])
    d_model = n_heads * rng.choice([1, 3, 5, 8, 16])
    return dict(
        vocab_size=rng.choice([1, 2, 31, 97, 258]),
        d_model=d_model,
        n_heads=n_heads,
        n_layers=rng.randint(1, 5),
        d_ff=rng.choice([None, 1, 7, 3 * d_model]),
        max_seq_len=rng.randint(1, 40),
        tie_embeddings=rng.random() < 0.5,
        norm_eps=rng.choice([1e-5, 1e-3, 9.999999747e-06]),
    )


def pair(seed: int = 0, **args) -> tuple[CausalLM, torch.nn.Module]:
    "Our model and theirs, with the same random weights, biases and norms included."
    torch.manual_seed(seed)
    hf_config = transformers.GPT2Config(
        vocab_size=args["vocab_size"],
        n_embd=args["d_model"],
        n_head=args["n_heads"],
        n_layer=args["n_layers"],
        n_inner=args.get("d_ff"),
        n_positions=args["max_seq_len"],
        layer_norm_epsilon=args.get("norm_eps", 1e-5),
        tie_word_embeddings=args.get("tie_embeddings", True),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = transformers.GPT2LMHeadModel(hf_config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    ours = CausalLM(GPT2Config(**args))
    ours.load_state_dict(from_hf(theirs.state_dict()))  # strict: every name and shape
    return ours, theirs


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def assert_same_gradients(ours, theirs) -> None:
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    ours = dict(ours.named_parameters())
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        assert_close(parameter.grad, expected[name], msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("seed", range(40))
def test_random_config_gives_the_same_logits_and_gradients(seed):
    args = random_args(seed)
    ours, theirs = pair(seed, **args)
    length = random.Random(seed).randint(1, args["max_seq_len"])
    ids, labels = torch.randint(args["vocab_size"], (2, 3, length))
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(ours.config)

    mine, reference = ours(ids), theirs(ids).logits
    assert_close(mine, reference)
    loss(mine, labels).backward()
    loss(reference, labels).backward()
    assert_same_gradients(ours, theirs)


def test_the_default_is_the_124m_model():
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(GPT2Config())
    with torch.device("meta"):
        ours = CausalLM(GPT2Config()).state_dict()
    expected = from_hf(theirs.state_dict())
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in expected.items()}


def test_explicit_positions_are_used_as_theirs_are():
    args = dict(vocab_size=31, d_model=12, n_heads=3, n_layers=2, max_seq_len=20)
    ours, theirs = pair(**args)
    ids = torch.randint(31, (2, 9))
    positions = torch.randint(20, (2, 9))  # any order
    reference = theirs(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
    assert_close(ours(ids, position_ids=positions), reference.logits)


def test_packed_documents_equal_their_documents_alone():
    "The reference never sees a packed row: it gets each document by itself."
    args = dict(vocab_size=31, d_model=12, n_heads=3, n_layers=3, max_seq_len=20)
    ours, theirs = pair(**args)
    lengths = [1, 7, 4, 8]
    ids, labels = torch.randint(31, (2, 1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]

    packed = ours(ids, document_ids=documents)
    alone = torch.cat([theirs(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone)
    loss(packed, labels).backward()
    loss(alone, labels).backward()
    assert_same_gradients(ours, theirs)


def test_the_mapping_notices_a_matrix_left_untransposed():
    "The check behind this file can fail: square q, k, v, o differ from their transposes."
    ours, theirs = pair(vocab_size=31, d_model=12, n_heads=3, n_layers=1, max_seq_len=20)
    ids = torch.randint(31, (1, 9))
    with torch.no_grad():
        weight = ours.model.layers[0].self_attn.o_proj.weight
        weight.copy_(weight.T.clone())
    with pytest.raises(AssertionError):
        assert_close(ours(ids), theirs(ids).logits)
