"""Drawings: what is drawn where, that nothing is clipped or covered; models are as drawn."""

import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[viz]'")

from PIL import Image

from skylar.models.decoder import CausalLM, active_parameters, count_parameters
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.presets import PRESETS, get_config
from skylar.utils import model_drawings, schematic
from skylar.viz import MODELS, PARTS, Node, Schematic, architecture, architectures, bars

ROOT = Path(__file__).parents[1]


def picture(s: Schematic) -> np.ndarray:
    "(height, width, 3) of the PNG that a notebook shows."
    return np.asarray(Image.open(io.BytesIO(s._repr_png_())).convert("RGB"))


def on_border(point, node: Node) -> bool:
    x, y = point
    across = np.isclose(x, [node.x0, node.x1]).any() and node.y0 - 1e-9 <= y <= node.y1 + 1e-9
    along = np.isclose(y, [node.y0, node.y1]).any() and node.x0 - 1e-9 <= x <= node.x1 + 1e-9
    return bool(across or along)


@pytest.mark.parametrize("bend", [0.0, 0.3])
def test_arrows_end_on_borders(bend):
    "Whichever way the second node lies, near, far, or in a corner."
    for angle in np.linspace(0, 2 * np.pi, 33):
        s = Schematic(12, 12)
        a = s.box(6, 6, "a")
        b = s.tensor(6 + 4 * np.cos(angle), 6 + 4 * np.sin(angle), "b", "B T D")
        start, end = s.arrow(a, b, bend=bend)
        assert on_border(start, a) and on_border(end, b)


def test_arrows_are_straight_where_a_center_faces_the_other_node():
    s = Schematic(10, 6)
    wide, narrow = s.box(5, 1, "wide", w=8), s.box(7, 4, "narrow", w=1)
    assert s.arrow(wide, narrow) == ((7, wide.y1), (7, narrow.y0))
    left, right = s.box(1, 5.4, "left", h=0.3, w=1), s.box(3.6, 5.2, "right", w=1)
    (x0, y0), (x1, y1) = s.arrow(left, right)
    assert (x0, x1) == (left.x1, right.x0) and y0 == y1


def test_corners_on_the_way():
    s = Schematic(10, 4)
    a, b = s.box(2, 1, "a"), s.box(8, 1, "b")
    start, end = s.arrow(a, b, "around", via=[(2, 3), (8, 3)])
    assert start == a.top and end == b.top
    (label,) = [node for name, node in s.placed if name == "around"]
    assert label.y0 > 3


def test_points_and_cells_take_arrows():
    s = Schematic(10, 4)
    grid = s.matrix(2, 2, [[1, 2], [3, 4]], fmt="d")
    start, end = s.arrow(grid.cells[0, 1], (8, 3))
    assert on_border(start, grid.cells[0, 1]) and end == (8, 3)
    assert s.arrow(grid.right, (9, 2)) == (grid.right, (9, 2))


LONG = "a name that is longer\nthan its box\nand of three lines"


@pytest.mark.parametrize("draw", [
    lambda s: s.box(8, 4, LONG),
    lambda s: s.tensor(8, 4, "a long name of a tensor", "batch positions heads width"),
    lambda s: s.matrix(8, 4, [[1234567.25, -1]], ["a long name"], ["x", "y"], title="title"),
    lambda s: s.tiles(8, 4, [[0, 1, 2]], {0: "a long name in the legend"}, title="title"),
    lambda s: s.text(8, 4, LONG, align="left"),
])
def test_text_lies_inside_its_node(draw):
    s = Schematic(16, 8)
    node = draw(s)
    unit = s.figure.dpi * 0.55
    for text in s.ax.texts:
        if text.get_text():
            x0, y0, x1, y1 = text.get_window_extent(s.renderer).extents / unit
            assert node.x0 <= x0 and x1 <= node.x1 and node.y0 <= y0 and y1 <= node.y1


def test_each_number_lies_inside_its_cell():
    s = Schematic(10, 4)
    values = [[1234.5, None], [float("nan"), "q·k"]]
    grid = s.matrix(5, 2, values, highlight=(0, 0))
    written = [t.get_text() for t in s.ax.texts if t.get_text()]
    assert written == ["1234.5", "q·k"]  # None and nan stay blank
    unit = s.figure.dpi * 0.55
    for text in (t for t in s.ax.texts if t.get_text()):
        x0, y0, x1, y1 = text.get_window_extent(s.renderer).extents / unit
        assert any(c.x0 < x0 and x1 < c.x1 and c.y0 < y0 and y1 < c.y1
                   for c in grid.cells.values())
    assert grid.cells[0, 0].y > grid.cells[1, 0].y  # row 0 is on top


@pytest.mark.parametrize("values", [torch.eye(2), np.eye(2), [[1, 0], [0, 1.0]]])
def test_matrices_come_from_anywhere(values):
    s = Schematic(4, 4)
    s.matrix(2, 2, values, highlight=[(0, 0), (1, 1)])
    assert [t.get_text() for t in s.ax.texts if t.get_text()] == ["1.0", "0.0", "0.0", "1.0"]


@pytest.mark.parametrize("shape", ["B T D", ("B", "T", "D"), "(B, T, D)"])
def test_shapes_are_written_one_way(shape):
    s = Schematic(4, 4)
    s.tensor(2, 2, "x", shape)
    assert "(B, T, D)" in [t.get_text() for t in s.ax.texts]
    s = Schematic(4, 4)
    s.tensor(2, 2, "x", torch.zeros(2, 3).shape)
    assert "(2, 3)" in [t.get_text() for t in s.ax.texts]


def test_partial_cover_is_refused():
    s = Schematic(10, 4)
    a, b = s.box(2, 2, "first"), s.box(5.4, 2, "second")
    with pytest.raises(ValueError, match="'third' at .* partly covers 'first'"):
        s.box(3, 2.2, "third")
    with pytest.raises(ValueError, match="'a label wider than the gap'"):
        s.arrow(a, b, "a label wider than the gap")
    inside = s.tensor(5.4, 2, "x", w=0.5, h=0.3)  # what lies wholly inside is meant so
    assert inside.inside(b) and not inside.overlaps(a)


def test_small_text_is_refused():
    with pytest.raises(ValueError, match="size=6"):
        Schematic(4, 4).text(2, 2, "tiny", size=6)


def test_what_is_drawn_beyond_the_sheet_is_shown():
    "The PNG grows, left and right, up and down; the title stays above everything."
    plain = Schematic(6, 3, "title")
    size = picture(plain).shape
    s = Schematic(6, 3, "title")
    nodes = [s.box(0, 0, "lower left"), s.box(6, 3.2, "upper right")]
    s.frame(nodes, "all")
    grown = picture(s)
    assert grown.shape[0] > size[0] and grown.shape[1] > size[1]
    margins = np.concatenate([grown[:3].ravel(), grown[-3:].ravel(), grown[:, :3].ravel()])
    assert (margins == 255).all()  # nothing is cut
    assert s.heading.get_position()[1] > s.placed[-1][1].y1


def test_colors_tell_what_is_what():
    def colors(**arguments):
        s = Schematic(4, 4)
        s.box(2, 2, "", **arguments)
        return {tuple(int(c) for c in p) for p in picture(s).reshape(-1, 3)[::7]}

    assert len(colors()) > 1 and colors() != colors(highlight=True)


def test_png_is_small_and_made_without_pyplot():
    import matplotlib.pyplot as plt

    open_before = plt.get_fignums()
    s = architecture("qwen3")
    png = s._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) < 60_000
    assert png == s._repr_png_() and plt.get_fignums() == open_before
    assert picture(s).shape[1] <= 930  # a notebook's width


def test_lessons_find_the_drawings_in_one_place():
    assert Schematic is schematic.Schematic and Node is schematic.Node
    assert architecture is model_drawings.architecture and MODELS is model_drawings.MODELS


def test_every_method_is_shown_in_the_notebook():
    cells = [cell for name in ("schematic", "model_drawings") for cell in json.loads(
        (ROOT / f"nbs/library/{name}.ipynb").read_text(encoding="utf-8"))["cells"]]
    examples = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"
                         and "#| export" not in "".join(c["source"]))
    methods = [name for name, _ in inspect.getmembers(Schematic, inspect.isfunction)
               if not name.startswith("_")]
    assert set(methods) == {"box", "tensor", "matrix", "tiles", "arrow", "text", "frame"}
    assert [name for name in methods if f"s.{name}(" not in examples] == []
    assert "architecture(" in examples and "architectures(" in examples


# --- whole models ---


def orange(s: Schematic) -> int:
    return sum(p.get_edgecolor()[:3] == (0xD5 / 255, 0x5E / 255, 0) for p in s.ax.patches)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_highlighted(name, part):
    "Each name changes the drawing, unless the model does not have that part."
    optional = ("positions", "qk_norm", "rope", "sinks", "router", "experts", "latents", "shared")
    has = part not in optional or MODELS[name].get(part)

    assert bool(orange(architecture(name, part))) == bool(has)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_highlighted_unasked(name):
    assert orange(architecture(name)) == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no part is called 'atention'; there are tokens"):
        architecture("gpt2", ["norm", "atention"])
    with pytest.raises(ValueError, match="no drawing of 'bert'; there are gpt2"):
        architecture("bert")


def test_differences_are_those_that_are_drawn():
    def highlighted(s):
        return len([p for p in s.ax.patches if p.get_linewidth() == 2])

    assert highlighted(architectures("gpt2")) == highlighted(architectures("gpt2", "gpt2")) == 0
    # projections, RoPE, heads, two norms and the last one, feed-forward, LM head
    assert highlighted(architectures("gpt2", "llama3")) == 8
    assert highlighted(architectures("llama3", "qwen3")) == 2  # QK-norm, LM head
    assert highlighted(architectures()) == 10
    assert highlighted(architectures("llama3", "mixtral")) == 1  # the feed-forward layer
    assert highlighted(architectures("mixtral", "qwen3_moe")) == 1  # QK-norm
    assert highlighted(architectures("qwen3", "qwen3_moe")) == 2  # feed-forward layer, LM head
    # projections, RoPE, heads, feed-forward layer
    assert highlighted(architectures("mixtral", "deepseek_v3")) == 4
    assert highlighted(architectures("deepseek_v3", "kimi_k2")) == 1  # experts without groups


def small(name):
    "A small config of the family that is drawn."
    if not MODELS[name].get("latents"):
        return get_config("test", name, vocab_size=97, n_layers=1)
    preset, changes = f"{name.split('_')[0]}-test", {}
    if preset not in PRESETS:  # Kimi K2's files are a DeepSeek-V3's, without groups
        preset, changes = "deepseek-test", dict(n_groups=1, topk_groups=1)
    return get_config(preset, vocab_size=97, n_layers=2, **changes)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_drawn(name):
    "The words in the drawing are true of the library's models."
    config = small(name)
    model, drawn = CausalLM(config), MODELS[name]
    names = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    kinds = {type(m).__name__ for m in model.modules()}
    assert ("RMSNorm" in kinds) == (drawn["norm"] == "RMSNorm")
    assert ("LayerNorm" in kinds) == (drawn["norm"] == "LayerNorm")
    assert any("embed_positions" in n for n in names) == bool(drawn["positions"])
    assert any("q_norm" in n for n in names) == bool(drawn["qk_norm"])
    assert hasattr(config, "rope_theta") == bool(drawn["rope"])
    assert any("gate_proj" in n or "gate_up_proj" in n for n in parameters) == (
        "SwiGLU" in drawn["ffn"] + drawn.get("experts", ""))
    assert any(".experts." in n for n in parameters) == bool(drawn.get("experts"))
    for part, layer in (("projections", "q_proj"), ("ffn", "up_proj")):
        biases = any(f"{layer}.bias" in n for n in parameters)
        assert biases == ("biases" in drawn[part] and "no biases" not in drawn[part])
    grouped, sizes = "grouped" in drawn["heads"] or "GQA" in drawn["heads"], drawn["sizes"]
    assert grouped == (sizes.get("K", sizes["H"]) < sizes["H"]) == hasattr(config, "n_kv_heads")
    assert any("kv_a_layernorm" in n for n in names) == bool(drawn.get("latents"))
    assert any("shared_experts" in n for n in names) == bool(drawn.get("shared"))
    assert any("e_score_correction_bias" in n for n in dict(model.named_buffers())) == (
        "bias" in drawn.get("router", ""))
    in_groups = getattr(config, "n_groups", 1) > 1
    assert in_groups == ("groups" in drawn.get("router", "")) == ("groups" in drawn["ffn"])


def test_sizes_are_those_of_the_published_models():
    "Parameters counted from the drawing's sizes, in millions."
    def millions(V, D, L, H, K, Dh, F, ffn, tied):
        block = 2 * D * H * Dh + 2 * D * K * Dh + ffn * D * F
        return (V * D * (1 if tied else 2) + L * block) / 1e6

    for name, ffn, tied, expected in (("gpt2", 2, True, 124), ("llama3", 3, False, 8030),
                                      ("qwen3", 3, True, 596)):
        assert millions(**MODELS[name]["sizes"], ffn=ffn, tied=tied) == pytest.approx(
            expected, rel=0.01)
        assert ("untied" not in MODELS[name]["head"]) == tied
    for name, expected in (("mixtral", 46_703), ("qwen3_moe", 30_532)):
        sizes = dict(MODELS[name]["sizes"])
        E, L, D = sizes.pop("E"), sizes["L"], sizes["D"]
        assert sizes.pop("k") < E and "untied" in MODELS[name]["head"]
        found = millions(**sizes | {"F": E * sizes["F"]}, ffn=3, tied=False) + L * E * D / 1e6
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name, total, active", [
    ("deepseek_v3", 671.0, 37.5), ("kimi_k2", 1026.4, 32.9)])
def test_sizes_of_models_with_latents(name, total, active):
    "The drawing's letters, as a config, are a model of the published size (in billions)."
    drawn = MODELS[name]
    fields = dict(
        V="vocab_size", D="d_model", L="n_layers", H="n_heads", Dn="qk_nope_head_dim",
        Dr="qk_rope_head_dim", Dv="v_head_dim", Rq="q_lora_rank", R="kv_lora_rank",
        F="d_expert", E="n_experts", k="top_k")
    sizes = {fields[key]: size for key, size in drawn["sizes"].items() if key != "Dh"}
    config = DeepSeekV3Config(**sizes, first_dense=drawn["dense"], n_groups=1, topk_groups=1)
    assert drawn["sizes"]["Dh"] == config.qk_nope_head_dim + config.qk_rope_head_dim
    assert count_parameters(config) / 1e9 == pytest.approx(total, abs=0.1)
    assert active_parameters(config) / 1e9 == pytest.approx(active, abs=0.1)


def test_bars_have_one_color_and_one_highlight():
    ax = bars({"a": 1, "b": 2, "c": 3}, "", highlight="b")
    drawn = [bar.get_facecolor() for bar in ax.patches]
    assert drawn[0] == drawn[2] != drawn[1]
    with pytest.raises(ValueError, match="no bar is called 'd'; there are a, b"):
        bars({"a": 1, "b": 2}, "", highlight="d")
