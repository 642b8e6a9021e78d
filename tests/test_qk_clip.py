"""QK-clip: the largest logit of each head, the rows that are scaled, and once a step for all.

The models, their batches and what each process runs are in clip_worker.py.
"""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clip_worker import ATTENTION, STEPS, TAU, D, T, V, small_model, train
from uneven import Rows

from skylar.cli import main
from skylar.layers.attention_backends import Positions, make_mask_mod
from skylar.layers.cache import KVCache
from skylar.layers.deepseek_moe import BiasBalancingConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mla import MLAConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import RoPEConfig, YaRNScaling
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM
from skylar.models.families.kimi_k2 import KimiK2Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import get_config
from skylar.training import qk_clip
from skylar.training.loss import NextTokenObjective
from skylar.training.metrics import read_metrics
from skylar.training.qk_clip import (
    AttentionLogits,
    ClippedAuxiliary,
    QKClipConfig,
    TrackedLogits,
    clip_factors,
    clip_gqa,
    clip_heads,
    clip_mla,
    max_attention_logits,
    queries_and_keys,
    track_logits,
)
from skylar.training.run import RunConfig, build_config, check_same, prepare_run, stored
from skylar.training.run import train as train_run
from skylar.utils.lesson import Workers
from skylar.utils.sharded_matrices import own_rows

YARN = YaRNScaling(factor=4.0, original_max_position_embeddings=8)
DEEPSEEK = replace(YARN, mscale=1.0, mscale_all_dim=1.0)
LAYERS = {  # d_model is D
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2, d_head=8),
    "mha, biases": GQAConfig(n_heads=4, d_head=8, bias=True),
    "mqa, no rope": GQAConfig(n_heads=4, n_kv_heads=1, d_head=8, rope=None, bias=True),
    "gqa, yarn, scale": GQAConfig(n_heads=6, n_kv_heads=2, d_head=4, scale=0.7,
                                  rope=RoPEConfig(scaling=YARN)),
    "window": GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, window=SlidingWindow(size=5)),
    "mla": ATTENTION["mla"], "mla without q_lora": ATTENTION["mla without q_lora"],
    "mla, yarn": MLAConfig(n_heads=4, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
                           v_head_dim=4, q_lora_rank=8, rope=RoPEConfig(scaling=DEEPSEEK)),
    "mla, halves, biases": MLAConfig(n_heads=4, kv_lora_rank=8, qk_nope_head_dim=2,
                                     qk_rope_head_dim=8, v_head_dim=4, interleaved=False,
                                     bias=True, scale=0.5),
}
ALL_LAYERS = pytest.mark.parametrize("name", LAYERS)
KINDS = pytest.mark.parametrize("kind", ATTENTION)


def layer_of(name: str):
    torch.manual_seed(0)
    layer = LAYERS[name].build(D)
    layer.init_weights(0.5, 0.5)
    with torch.no_grad():
        for n, p in layer.named_parameters():
            if n.endswith("bias"):
                p.normal_()
    return layer.train()


def all_logits(layer, x) -> torch.Tensor:  # (B, H, T, T)
    "From what enters attention's kernel, not from `queries_and_keys`."
    seen = {}
    module = type(layer).forward.__globals__
    kernel = module["scaled_dot_product_attention"]

    def keep(q, k, v, mask, dropout=0.0):
        seen["logits"] = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
        seen["logits"] = seen["logits"] / math.sqrt(q.shape[-1])
        return kernel(q, k, v, mask, dropout)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(module, "scaled_dot_product_attention", keep)
        layer(x)
    return seen["logits"]


def visible_of(layer, tokens: Positions, n: int = 2) -> torch.Tensor:  # (n, 1, T, T)
    "Pair by pair, in Python."
    mask_mod = make_mask_mod(tokens, tokens, getattr(layer.config, "window", None))
    index = torch.arange(len(tokens))
    return torch.stack([torch.stack([torch.stack([
        mask_mod(torch.tensor(b), torch.tensor(0), i, j) for j in index]) for i in index])
        for b in range(n)])[:, None]


# --- the largest logit ---


@pytest.mark.parametrize("room", [1, 2**24])  # scores in memory: of one sequence, of all
@pytest.mark.parametrize("tile", [1, 4, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("masked", ["causal", "window", "sinks", "documents"])
def test_tile_by_tile_it_is_the_maximum_of_all_scores(monkeypatch, room, tile, heads, masked):
    monkeypatch.setattr(qk_clip, "ROOM", room)
    monkeypatch.setattr(qk_clip, "TILE", tile)
    torch.manual_seed(1)
    (H, K), n, B = heads, 13, 3
    q, k = torch.randn(B, H, n, 8), torch.randn(B, K, n, 8)
    steps = torch.arange(n)
    documents = torch.tensor([[5], [9], [0]]) <= steps if masked == "documents" else None
    documents = None if documents is None else documents.long()
    window = {"window": SlidingWindow(size=3),
              "sinks": SlidingWindow(size=3, num_sink_tokens=2)}.get(masked)
    tokens = Positions(cache_position=steps, position_ids=steps, document_ids=documents)
    mask_mod, expected = make_mask_mod(tokens, tokens, window), torch.full((H,), -math.inf)
    scores = 0.3 * q @ k.repeat_interleave(H // K, 1).mT  # key heads in the order of GQA
    for b, i, j in itertools.product(range(B), range(n), range(n)):
        if mask_mod(torch.tensor(b), torch.tensor(0), torch.tensor(i), torch.tensor(j)):
            expected = torch.maximum(expected, scores[b, :, i, j])
    found = max_attention_logits(q, k, mask_mod, 0.3)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32 and not found.requires_grad


def test_what_is_masked_does_not_count():
    "A key of the future, of another document or outside the window may be as large as it likes."
    q, k = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4)
    k[:, :, 5] = 1e6
    steps = torch.arange(6)
    tokens = Positions(cache_position=steps, position_ids=steps)
    mod = make_mask_mod(tokens, tokens)
    assert max_attention_logits(q[:, :, :5], k[:, :, :5], mod, 1.0) == 4
    assert max_attention_logits(q, k, mod, 1.0) == 4e6  # the last query sees it
    k = k.flip(2)  # now the first key
    documents = Positions(cache_position=steps, position_ids=steps,
                          document_ids=torch.tensor([[0, 1, 1, 1, 1, 1]]))
    q[:, :, 0] = 0  # nor does the only query that may
    assert max_attention_logits(q, k, make_mask_mod(documents, documents), 1.0) == 4
    window = make_mask_mod(tokens, tokens, SlidingWindow(size=1))
    assert max_attention_logits(q, k, window, 1.0) == 4


def test_all_logits_may_be_negative():
    q, k = torch.ones(2, 3, 4, 8), -torch.ones(2, 3, 4, 8)
    steps = torch.arange(4)
    tokens = Positions(cache_position=steps, position_ids=steps)
    assert max_attention_logits(q, k, make_mask_mod(tokens, tokens), 0.5).tolist() == [-4.0] * 3


@ALL_LAYERS
def test_a_tracked_layer_returns_the_largest_of_what_its_kernel_sees(name):
    layer, x = layer_of(name), torch.randn(2, 9, D)
    visible = visible_of(layer, Positions.of(x))
    expected = all_logits(layer, x).masked_fill(~visible, -math.inf).amax((0, 2, 3))
    layer.__class__ = qk_clip.tracked_class(type(layer))
    _, extra = layer(x)
    assert isinstance(extra, AttentionLogits)
    torch.testing.assert_close(extra.maxima, expected, atol=1e-5, rtol=1e-5)


def test_packed_documents_have_the_maxima_of_separate_ones():
    model = small_model("mla")
    track_logits(model)
    ids = torch.randint(V, (1, 30))
    documents = (torch.arange(30) >= 11).long()[None]

    def maxima(*args, **options):
        _, extras = model.model(*args, **options, return_extras=True)
        return torch.stack([extra.maxima for extra in extras])

    alone = torch.maximum(maxima(ids[:, :11]), maxima(ids[:, 11:]))
    torch.testing.assert_close(maxima(ids, document_ids=documents), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(maxima(ids), alone)


# --- the factor ---


def test_a_head_whose_maximum_is_not_positive_gives_no_nan():
    maxima = torch.tensor([200.0, 100.0, 99.0, 0.0, -0.0, -5.0, -math.inf, math.inf, math.nan])
    factors = clip_factors(maxima, 100.0)
    assert factors.tolist() == [0.5] + [1.0] * 8
    naive = torch.minimum(torch.ones(()), 100.0 / maxima)
    assert naive[5].sqrt().isnan() and (factors > 0).all()


@ALL_LAYERS
def test_nothing_is_changed_by_a_factor_of_one(name):
    layer = layer_of(name)
    before = copy.deepcopy(layer.state_dict())
    clip_of(layer)(layer, torch.ones(layer.config.n_heads))
    assert all(torch.equal(v, before[n]) for n, v in layer.state_dict().items())


# --- the rows ---


def clip_of(layer):
    return clip_mla if isinstance(layer.config, MLAConfig) else clip_gqa


@ALL_LAYERS
@pytest.mark.parametrize("seed", range(3))
def test_clipped_logits_are_gamma_times_what_they_were(name, seed):
    layer, x = layer_of(name), torch.randn(2, 9, D)
    gamma = torch.rand(layer.config.n_heads, generator=torch.Generator().manual_seed(seed))
    gamma[seed] = 1.0  # a head beside the others that needs none
    before = all_logits(layer, x)
    clip_of(layer)(layer, gamma)
    torch.testing.assert_close(
        all_logits(layer, x), gamma[:, None, None] * before, atol=1e-4, rtol=1e-4)


@ALL_LAYERS
def test_queries_and_keys_are_those_of_the_kernel(name):
    layer, x = layer_of(name), torch.randn(2, 9, D)
    q, k, scale = queries_and_keys(layer, x, layer.prepare(x))
    found = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT)
    torch.testing.assert_close(found, all_logits(layer, x), atol=1e-5, rtol=1e-5)


def test_a_head_alone_is_clipped_as_in_the_report():
    "Both sides by the root."
    layer = layer_of("mha, biases")
    q, k = layer.q_proj.weight.detach().clone(), layer.k_proj.bias.detach().clone()
    clip_gqa(layer, torch.tensor([0.25, 1.0, 1.0, 0.81]))
    factors = torch.tensor([0.5, 1.0, 1.0, 0.9]).repeat_interleave(8)
    torch.testing.assert_close(layer.q_proj.weight.detach(), factors[:, None] * q)
    torch.testing.assert_close(layer.k_proj.bias.detach(), factors * k)


def test_in_latent_attention_shared_keys_and_values_stay():
    layer, c = layer_of("mla, yarn"), LAYERS["mla, yarn"]
    before = copy.deepcopy(layer.state_dict())
    clip_mla(layer, torch.tensor([0.25, 1.0, 0.04, 1.0]))
    ratio = {n: v / before[n] for n, v in layer.state_dict().items()}
    changed = {n for n, r in ratio.items() if not torch.equal(r, torch.ones_like(r))}
    assert changed == {"q_b_proj.weight", "kv_b_proj.weight"}
    q = ratio["q_b_proj.weight"].unflatten(0, (4, -1))
    kv = ratio["kv_b_proj.weight"].unflatten(0, (4, -1))
    for head, gamma in enumerate((0.25, 1.0, 0.04, 1.0)):
        n, root = c.qk_nope_head_dim, math.sqrt(gamma)
        for part, expected in ((q[head, :n], root), (q[head, n:], gamma), (kv[head, :n], root),
                               (kv[head, n:], 1.0)):
            torch.testing.assert_close(part, torch.full_like(part, expected))


def test_rows_of_a_whole_parameter_are_all_its_own():
    rows = torch.arange(4)
    assert own_rows(torch.zeros(4, 2), rows) is rows


# --- tracking changes nothing ---


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_stay(kind, dtype):
    """In bf16, too: autocast keeps the weights that it has cast. Cast first under no_grad, they
    would have no gradient."""
    found = []
    for track in (False, True):
        model = small_model(kind)
        objective = NextTokenObjective(model)
        if track:
            QKClipConfig(tau=TAU).attach(objective)
        ids = torch.randint(V, (4, T + 1), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            output = objective(batch)
        output.loss_sum.backward()
        found.append((output.loss_sum, *(p.grad for p in model.parameters())))
        assert bool(output.maxima) == track
    assert all(torch.equal(a, b) for a, b in zip(*found))


@KINDS
def test_evaluation_and_caches_get_the_output_alone(kind):
    model = small_model(kind)
    plain = copy.deepcopy(model).eval()
    objective = NextTokenObjective(model)
    QKClipConfig(tau=TAU).attach(objective)
    ids = torch.randint(V, (2, T + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    assert objective.eval()(batch).maxima == {}
    with torch.no_grad():
        found, expected = (m(ids[:, :-1], cache=KVCache(m.decoder_config, 2, T))
                           for m in (model, plain))
    assert torch.equal(found, expected)
    objective.train()
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, TrackedLogits) and torch.is_tensor(layer.eval()(torch.randn(1, 3, D)))


def test_a_threshold_that_is_never_reached_changes_no_bit():
    assert_same(train("gqa", tau=1e9), train("gqa", tau=2e9), exact=True)
    assert_same(train("mla", tau=1e9), train("mla", tau=2e9), exact=True)
    assert not any(train("gqa", tau=1e9)["scaled"])


def test_layers_of_a_kind_share_one_class():
    "So that identical blocks compile to one graph."
    model = small_model("gqa")
    track_logits(model)
    track_logits(model)  # once more does no harm
    kinds = {type(block.self_attn) for block in model.model.layers}
    assert len(kinds) == 1 and kinds.pop().__mro__.count(TrackedLogits) == 1


def test_a_tracked_model_is_saved_as_what_it_is(tmp_path):
    config = get_config("test", "llama3", vocab_size=V, d_model=D, n_heads=4, n_kv_heads=2,
                        d_head=8, d_ff=48, n_layers=2, max_seq_len=64)
    model = CausalLM(config)
    names = list(model.state_dict())
    track_logits(model)
    assert list(model.state_dict()) == names
    save_pretrained(model.eval(), tmp_path / "m")
    back, ids = from_pretrained(tmp_path / "m"), torch.randint(V, (2, 9))
    assert back.config == config and torch.equal(back(ids), model(ids))
    assert not isinstance(back.model.layers[0].self_attn, TrackedLogits)


# --- once a step ---


def assert_same(found: dict, expected: dict, exact: bool = False) -> None:
    assert found["keep"] == expected["keep"] and len(found["maxima"]) == len(expected["maxima"])
    for a, b in zip(found["maxima"], expected["maxima"]):
        torch.testing.assert_close(a, b, **(dict(atol=0, rtol=0) if exact else
                                            dict(atol=2e-3, rtol=1e-3)))
    for name, weight in expected["weights"].items():
        if exact:
            assert torch.equal(found["weights"][name], weight), name
        else:
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def alone() -> dict:
    return {kind: train(kind) for kind in ATTENTION}


@KINDS
def test_heads_are_clipped_in_these_runs(alone, kind):
    "And others are not; else nothing below would show anything."
    run = alone[kind]
    clipped = torch.stack(run["maxima"]) > TAU
    assert len(clipped) == STEPS and clipped.any() and not clipped.all()
    assert run["keep"] == [True] * STEPS and sum(map(bool, run["scaled"])) >= 3
    assert all("max_logit" in row for row in run["rows"])


@KINDS
def test_exactly_the_rows_of_the_formula_are_scaled_after_the_optimizer(alone, kind):
    run, config = alone[kind], ATTENTION[kind]
    for maxima, scaled in zip(run["maxima"], run["scaled"]):
        gamma = clip_factors(maxima, TAU).view(2, config.n_heads)
        model = small_model(kind)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        track_logits(model)
        clip_heads(model, maxima, TAU, torch.tensor(True))
        for name, p in model.named_parameters():
            ratio = (p / before[name]).detach()
            expected = scaled.get(name, torch.ones_like(ratio))
            used = before[name] != 0
            torch.testing.assert_close(ratio[used], expected[used], atol=1e-4, rtol=1e-4)
        assert (gamma < 1).any(1).tolist() == [
            any(f"layers.{i}." in name for name in scaled) for i in range(2)]


@KINDS
@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulation_has_the_maxima_of_one_large_batch(alone, kind, micro):
    found = train(kind, micro=micro)
    assert len(found["maxima"]) == STEPS  # once a step, not once a micro-batch
    assert_same(found, alone[kind])


@KINDS
def test_recomputed_activations_change_nothing(alone, kind):
    assert_same(train(kind, parallel={"recompute": True}), alone[kind], exact=True)


@KINDS
def test_a_skipped_step_clips_nothing(kind):
    found = train(kind, bad=3)
    assert found["keep"] == [True, True, False, True, True]
    assert (found["maxima"][2] > TAU).any() and not found["scaled"][2]
    assert sum(map(bool, found["scaled"])) >= 3
    assert all(w.isfinite().all() for w in found["weights"].values())


@KINDS
@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_resumed_bit_for_bit(tmp_path, kind, muon):
    straight = train(kind, steps=6, muon=muon)
    train(kind, steps=3, muon=muon, out_dir=tmp_path / "run", save_every=3)
    found = train(kind, steps=6, muon=muon, out_dir=tmp_path / "run", save_every=3, resume=True)
    assert len(found["maxima"]) == 3 and any(found["scaled"])
    for a, b in zip(found["maxima"], straight["maxima"][3:]):
        assert torch.equal(a, b)
    for name, weight in straight["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


def test_without_clipping_the_logits_grow_beyond_and_with_it_they_stay_near():
    free, bounded = (train("gqa", tau=tau, steps=25, muon=True) for tau in (1e9, 4.0))
    assert free["maxima"][-1].max() > 3 * 4.0
    assert max(m.max() for m in bounded["maxima"][5:]) < 2 * 4.0


# --- over the ranks ---

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import torch.distributed as dist
from clip_worker import train
dist.init_process_group("gloo")
"""


def start(n: int):
    workers = Workers(n, SETUP)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def two():
    yield from start(2)


@pytest.fixture(scope="module")
def four():
    yield from start(4)


def on_rank(kind, parallel, options):
    return train(kind, parallel, **options)


SHARED = [(2, {"strategy": "ddp"}), (2, {}), (2, {"recompute": True}), (4, {}),
          (4, {"replicas": 2})]


@KINDS
@pytest.mark.parametrize(("n", "parallel"), SHARED, ids=str)
def test_several_ranks_equal_one_process(request, alone, kind, n, parallel):
    workers = request.getfixturevalue({2: "two", 4: "four"}[n])
    answers = workers.run(on_rank, kind, parallel, {"micro": 2} if n == 2 else {})
    for found in answers:
        assert_same(found, alone[kind])
        for name, weight in answers[0]["weights"].items():
            assert torch.equal(found["weights"][name], weight), name


@pytest.mark.parametrize(("n", "parallel"), [
    (2, {"tensor": 2}), (4, {"tensor": 2})], ids=str)
def test_tensor_parallel_ranks_clip_their_own_heads(request, alone, n, parallel):
    workers = request.getfixturevalue({2: "two", 4: "four"}[n])
    answers = workers.run(on_rank, "gqa", parallel, {})
    expected = [m.view(2, 4) for m in alone["gqa"]["maxima"]]
    for rank, found in enumerate(answers):
        own = slice(2 * (rank % 2), 2 * (rank % 2) + 2)  # of the four heads of each layer
        for a, b in zip(found["maxima"], expected):
            torch.testing.assert_close(a.view(2, 2), b[:, own], atol=2e-3, rtol=1e-3)
        for name, weight in alone["gqa"]["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, atol=1e-3, rtol=1e-3)


def test_a_rank_alone_would_not_have_the_maximum(two):
    "Each of the two has a larger one for some head: neither's own would do."
    whole = train("gqa", steps=1)["maxima"][0]
    halves = []
    for rank in range(2):
        model = small_model("gqa")
        objective = NextTokenObjective(model)
        QKClipConfig(tau=TAU).attach(objective)
        halves.append(objective(next(iter(Rows(1, rank, 2, least=0.2)))).maxima["attention_logits"])
    torch.testing.assert_close(torch.maximum(*halves), whole)
    assert (halves[0] > halves[1]).any() and (halves[1] > halves[0]).any()
    for found in two.run(on_rank, "gqa", {}, {"steps": 1}):
        torch.testing.assert_close(found["maxima"][0], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {}], ids=str)
def test_a_step_that_one_rank_cannot_take_is_not_clipped_by_any(two, parallel):
    for found in two.run(on_rank, "gqa", parallel, {"bad": 2, "bad_rank": 1}):
        assert found["keep"] == [True, False, True, True, True]
        assert not found["scaled"][1] and found["scaled"][0]


@pytest.mark.parametrize("parallel", [{"strategy": "ddp"}, {}], ids=str)
def test_two_ranks_save_and_go_on_bit_for_bit(two, tmp_path, parallel):
    straight = two.run(on_rank, "mla", parallel, {"steps": 6})
    options = {"out_dir": tmp_path / "run", "save_every": 3}
    two.run(on_rank, "mla", parallel, options | {"steps": 3})
    again = two.run(on_rank, "mla", parallel, options | {"steps": 6, "resume": True})
    for found, expected in zip(again, straight):
        for name, weight in expected["weights"].items():
            assert torch.equal(found["weights"][name], weight), name


# --- beside a model's own auxiliary ---


def sparse() -> KimiK2Config:
    return KimiK2Config(
        vocab_size=V, d_model=D, n_heads=2, n_layers=2, d_ff=48, first_dense=1, d_expert=12,
        n_experts=8, top_k=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=4, max_seq_len=64, rope_scaling=None, init_std=0.3,
        bias_rate=0.05, sequence_loss=0.01)


def test_a_sparse_model_is_balanced_as_before():
    ids = torch.randint(V, (4, T + 1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    found = []
    for tau in (None, 1e9):
        torch.manual_seed(0)
        objective = NextTokenObjective(CausalLM(sparse()))
        QKClipConfig(tau=tau).attach(objective)
        output = objective(batch)
        objective.after_step({**output.sums, **output.maxima}, torch.tensor(True))
        biases = [b for n, b in objective.named_buffers() if n.endswith("correction_bias")]
        found.append((output.loss_sum, output.sums["expert_counts"], torch.stack(biases)))
        assert ("attention_logits" in output.maxima) == (tau is not None)
        assert "max_violation" in output.metrics
    assert all(torch.equal(a, b) for a, b in zip(*found)) and found[0][2].any()
    assert isinstance(objective.auxiliary, ClippedAuxiliary)
    assert isinstance(objective.auxiliary.inner, BiasBalancingConfig)
    assert objective.auxiliary.inner == sparse().decoder().auxiliary


# --- what is refused ---


def test_attention_that_cannot_be_clipped_is_refused_in_one_line():
    on = QKClipConfig(tau=100.0)
    for family, said in (("qwen3", "QK-norm undoes"), ("gpt2", "no rule for"),
                         ("gpt_oss", "no rule for SinkAttention")):
        sizes = {} if family == "gpt2" else {"n_kv_heads": 2}
        model = CausalLM(get_config("test", family, vocab_size=V, d_model=D, n_heads=4,
                                    d_head=8, n_layers=1, **sizes))
        with pytest.raises(ValueError, match=said) as error:
            on.attach(NextTokenObjective(model))
        assert "\n" not in str(error.value) and "qk_clip.tau" in str(error.value)
        assert not any(isinstance(m, TrackedLogits) for m in model.modules())
        QKClipConfig().attach(NextTokenObjective(model))  # off: any model


def test_an_objective_that_reads_no_extras_is_refused():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model("gqa")

    with pytest.raises(ValueError, match="Other does not read"):
        QKClipConfig(tau=1.0).attach(Other())


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf, True])
def test_a_threshold_must_be_positive(tau):
    with pytest.raises(ValueError, match="tau="):
        QKClipConfig(tau=tau)


def test_one_layer_with_qk_norm_is_enough_to_refuse():
    block = small_model("gqa").decoder_config.blocks[0]
    normed = replace(block, attention=replace(block.attention, qk_norm=RMSNormConfig()))
    config = replace(small_model("gqa").decoder_config, blocks=(block, normed))
    with pytest.raises(ValueError, match="QK-norm"):
        QKClipConfig(tau=1.0).check(CausalLM(config))


# --- by flag ---


def test_it_is_off_by_default_and_old_runs_are_resumed(tmp_path):
    config = RunConfig(data="data")
    assert config.qk_clip == QKClipConfig() and config.qk_clip.tau is None
    old = stored(config)
    del old["qk_clip"]  # of a run before there was such a setting
    check_same(build_config(RunConfig, old), config, tmp_path)
    other = build_config(RunConfig, {"data": "data", "qk_clip": {"tau": 30.0}})
    with pytest.raises(ValueError, match="qk_clip.tau is None"):
        check_same(config, other, tmp_path)


def run_of(tmp_path, monkeypatch, **changes) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    words = "the king said that a summer day is long and love is short".split()
    for i in range(24):
        text = " ".join(words[(i + 3 * j) % len(words)] for j in range(120))
        Path(f"texts/{i:02}.txt").write_text(text + "\n")
    sizes = {"d_model": 16, "d_head": 4, "d_ff": 32, "n_layers": 1, "max_seq_len": 64}
    return build_config(RunConfig, {
        "data": "data", "out": "run", "family": "llama3", "model": sizes,
        "corpus": {"source": "texts", "vocab_size": 300},
        "loader": {"batch_size": 2, "seq_len": 32}, "optimizer": {"lr": 1e-2},
        "train": {"steps": 4, "log_every": 1, "eval_every": 2, "eval_batches": 1,
                  "save_every": 2, "device": "cpu", "dtype": "float32"}} | changes)


def test_a_run_clips_by_flag(tmp_path, monkeypatch):
    clipped = []
    monkeypatch.setattr(qk_clip, "clip_heads", lambda model, maxima, tau, keep: clipped.append(
        (tau, maxima.shape, bool(keep))))
    config = run_of(tmp_path, monkeypatch, qk_clip={"tau": 0.25})
    result = train_run(prepare_run(config), quiet=True)
    assert result.finished and clipped == [(0.25, (4,), True)] * 4
    assert all("max_logit" in row for row in result.rows)


def test_a_run_with_qk_norm_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = run_of(tmp_path, monkeypatch, qk_clip={"tau": 0.25}, family="qwen3")
    with pytest.raises(ValueError, match="QK-norm"):
        prepare_run(config)
    assert not Path("run").exists()


def test_the_plain_command_trains_the_small_kimi_with_muonclip(tmp_path, monkeypatch, capsys):
    run_of(tmp_path, monkeypatch)  # writes the texts
    words = """pretrain --preset kimi-test --data data --out run --corpus.source texts
        --corpus.vocab_size 300 --loader.batch_size 2 --loader.seq_len 32 --train.steps 3
        --train.log_every 1 --train.eval_batches 1 --train.device cpu --train.dtype float32
        --optimizer.kind muon --optimizer.lr 0.01 --qk_clip.tau"""
    assert main([*words.split(), "0.01"]) == 0
    rows = [row for row in read_metrics("run/metrics.jsonl") if "max_logit" in row]
    assert len(rows) == 3 and all(row["max_logit"] > 0.01 for row in rows)
    assert main(["export", "--model", "run", "--out", "exported"]) == 0
    assert main(["generate", "--model", "exported", "--prompt", "the king", "--max_new_tokens",
                 "4", "--temperature", "0"]) == 0
    capsys.readouterr()
    assert main([*words.split(), "0"]) == 2
    assert "tau=0" in capsys.readouterr().err
