"""Names are the field's: words that were retired stay out of the code, and out of lessons.

Identifiers, comments, docstrings, help and error texts of the package, the benchmarks and the tools
are read token by token. A finding says file:line and what to write instead. All word lists stand
here; `tests/test_lessons.py` reads text and code of the rewritten lessons with `retired_in_text`
and `retired_in_lesson`.
"""

import io
import re
import token
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SEARCHED = ("skylar/**/*.py", "bench/**/*.py", "tools/**/*.py", "docs/*.py", "*.py")

# Files that still hold retired words. This list may only become shorter: a file that is clean must
# be taken off it (`test_exempt_files_still_need_it`), and nothing may be added.
EXEMPT = {"skylar/layers/attention_sinks.py"}  # `sinks` is the name in gpt-oss's files

MODULES = {  # file names that say where code used to be
    "skylar/inference/packing.py": "skylar/inference/cpu_fused.py",
    "skylar/layers/ffn.py": "skylar/layers/mlp.py",
    "skylar/layers/masks.py": "skylar/layers/attention_backends.py",
    "skylar/models/layouts.py": "skylar/models/families/",
}

IDENTIFIERS = {  # whole identifiers, upper and lower case as written
    "Tokens": "Positions",
    "_lone_row": "_bf16_single_query",
    "_Scalar": "(gone)",
    "Window": "SlidingWindow",
    "seat|seats|seated|_take_seats": "slot, slot_info, _write_slots",
    "NOBODY": "EMPTY_SLOT",
    "make_room|FIRST_ROOM": "grow, INITIAL_CAPACITY",
    "_last_to_come|_go_back|_moved": "_last_writer, _crop_slots, _reorder",
    "RingCache": "SlidingWindowCache",
    "GrowingCache": "DynamicLayerCache",
    "GluedCache": "ConcatCache",
    "LentCache|_LentLayer": "TransformersCacheAdapter",
    "Places": "PositionStore",
    "check_fit": "validate_kv",
    "plain_frequencies|_radii": "inv_freq",
    "_Stretch": "RoPEScaling",
    "look_up": "embed_positions",
    "Stored|stored_tensors": "TensorMapping, weight_map",
    "hugging_face_type": "hf_model_type",
    "end_ids": "eos_token_ids",
    "_appearing": "atomic_directory",
    "_inside": "safe_join",
    "_unpacked": "bundled_model",
    "PackagePlace|HubPlace|FilePlace": "PyPISource, HubSource, FileSource",
    "Packed(?!Loader|Dataset|Sequence)\\w+": "Fused...",
    "turned_product": "transposed_linear",
    "likeliest": "argmax",
    "penalise_repetition": "apply_repetition_penalty",
    "keep_top_k|keep_top_p": "top_k_filter, top_p_filter",
    "Stepper": "TrainStep",
    "Meter": "MetricsLogger",
    "next_token_loss": "NextTokenObjective",
    "Reporter": "ProgressReporter",
    "RunOnDisk": "CheckpointManager",
    "endless": "cycle",
    "max_skips": "max_nonfinite_steps",
    "plain_errors": "unwrap_dcp_errors",
    "eval_run": "evaluate_run",
    "_Guard": "ControlTokenGuard",
    "crack": "escape",
    "forgeable": "reserved_ids",
}

IN_MODELS = {  # identifiers too common to be retired everywhere: in layers, models and inference
    "additive": "to_additive_mask",
    "attend": "scaled_dot_product_attention",
    "choose": "select_backend",
    "doubled|room": "grow, capacity",
    "interleave": "to_interleaved",
    "magnitude": "attention_factor",
    "packed": "fuse_for_cpu; for packed sequences: packed_...",
    "_pieces": "_iter_tiles",
    "rule": "mask_mod",
    "sinks": "num_sink_tokens",
    "visible": "mask construction",
}

WORDS = {  # whole words in texts, and between the underscores of identifiers; any case
    r"twins?": "fused model",
    r"coats?": "wrapper, adapter",
    r"crates?": "KV heads",
    r"kitchens?": "model families",
    r"yardsticks?": "metric",
    r"oracles?": "reference implementation",
    r"leash": "bound",
    r"seats?|seated": "slot",
    r"glued?": "merge, concatenate",
    r"standing still": "static version",
    r"raw scores": "logits",
    r"the world": "other tools",
    r"likeliest": "most likely, argmax",
}

PERSONS = (  # what has no ears and no wishes
    "word|token|character|position|head|key|query|value|vector|matrix|layer|neuron|score|weight"
)
PROSE = {  # in the text of lessons and in strings and comments of their code; any case
    r"hears?|heard|listen(?:s|ed|ing)?": "attends to",
    rf"(?:{PERSONS})s? (?:that |which )?"
    r"(?:asks?|answers?|wants?|knows?|thinks?|speaks?|says?|talks?|sits?|believes?)":
        "query, key, attends to, holds: tensors are no persons",
    r"(?:model|network|GPT)s? (?:that )?(?:speaks?|says?|talks?|thinks?)": "generates, predicts",
    r"it (?:speaks?|talks)": "generates",
    r"looks? at whom|who looks at": "attends to, mask",
    r"shares? of (?:the )?attention": "attention weight",
    r"mixtures? of (?:the |all )?(?:notes?|values?)": "weighted sum of the values",
    r"(?:what|as) (?:this|the) run says": "result",
    r"where (?:it|each|every|a|the)(?: \w+)? (?:stands|sits)": "position",
    r"(?:sits?|sat) down": "is written to",
    r"loud(?:er|est|ness)?": "magnitude",
    r"bends?|bent": "nonlinearity",
    r"(?<!back\s)doors?": "gate",
    r"entrances?": "embedding",
    r"troubles?": "problem",
    r"(?:hot|cold) (?:ends?|sides?|temperatures?|sampling)": "high and low temperature",
    r"packed weights?": "fused, prepacked or quantized weights",
}
DASHES = re.compile(r"—|(?<=\w )–(?= \w)")

BRITISH = [  # stems; any case
    r"(?:"
    r"capital|categor|character|custom|equal|final|formal|general|global|harmon|initial|local|"
    r"material|maxim|minim|modern|modular|normal|optim|organ|parallel|parametr|parenthes|penal|"
    r"priorit|quant|random|real|recogn|regular|serial|special|stabil|standard|summar|synchron|"
    r"token|util|vector|visual"
    r")is(?:e[sdr]?|ing|ations?|ers)\b",
    r"analys(?:e|ed|ing)\b",
    r"(?:colour|behaviour|favour|flavour|honour|neighbour|rigour|vigour)\w*",
    r"(?:centre|metre|theatre)[sd]?\b",
    r"(?:model|label|cancel|travel|signal|channel|marshal)l(?:ed|ing|er)\b",
    r"(?:learnt|spelt|whilst|amongst|artefacts?|judgement|catalogue|licence|defence|grey)\b",
    r"fulfil\b",
]

NAMES = [(re.compile(rf"(?:{old})\Z"), new) for old, new in IDENTIFIERS.items()]
MODEL_NAMES = [(re.compile(rf"(?:{old})\Z"), new) for old, new in IN_MODELS.items()]
TEXTS = [
    *((re.compile(rf"\b(?:{old})\b", re.I), new) for old, new in WORDS.items()),
    *((re.compile(rf"\b(?:un|re|pre|de)?-?{old}", re.I), "American spelling") for old in BRITISH),
]
SPACE = r"(?: +| *\n *)"  # a line may end between two words, a paragraph may not
PROSE_TEXTS = [
    *TEXTS,
    *(
        (re.compile(rf"\b(?:{old})\b".replace(" ", SPACE), re.I), new)
        for old, new in PROSE.items()
    ),
    (DASHES, "a comma, a colon or a full stop"),
]
TEXT_TOKENS = {token.STRING, tokenize.COMMENT} | {
    getattr(token, name) for name in ("FSTRING_MIDDLE",) if hasattr(token, name)
}


def spoken(identifier: str) -> str:
    """An identifier as words: `_LentLayer` and `_lent_layer` are both "lent layer"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", identifier).strip()


def retired(
    source: str, models: bool = True, prose: bool = False
) -> Iterator[tuple[int, str, str]]:
    """(line, what is written there, what to write instead) for each retired word."""
    names = NAMES + MODEL_NAMES * models
    for kind, string, (line, _), *_ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == token.NAME:
            yield from ((line, string, new) for old, new in names if old.match(string))
            text = spoken(string)
        elif kind in TEXT_TOKENS:
            text = string
        else:
            continue
        for old, new in PROSE_TEXTS if prose and kind != token.NAME else TEXTS:
            for found in old.finditer(text):
                yield line + text[: found.start()].count("\n"), found[0], new


def retired_in_lesson(source: str) -> Iterator[tuple[int, str, str]]:
    """Retired words in a lesson's code cell; IPython's magics are not Python."""
    yield from retired(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source), models=False, prose=True)


def retired_in_text(markdown: str) -> Iterator[tuple[int, str, str]]:
    """Retired words in a lesson's text: code, maths and where links lead are left out."""
    text = blanked(markdown)
    for old, new in PROSE_TEXTS:
        for found in old.finditer(text):
            yield 1 + text[: found.start()].count("\n"), " ".join(found[0].split()), new


def blanked(markdown: str) -> str:
    """The text as a reader reads it, on its own lines; labels of mermaid drawings are text."""
    code = r"```(?!mermaid)\w*\n.*?```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)\n]*\)|https?://\S+"
    return re.sub(code, lambda m: " \n" * m[0].count("\n") + " ", markdown, flags=re.S)


@cache
def findings(name: str) -> list[str]:
    """`file:line: word -> better word` for a file of the tree."""
    moved = [f"{name}:1: the file's name -> {MODULES[name]}"] if name in MODULES else []
    models = bool(re.match("skylar/(layers|models|inference)/", name))
    found = sorted(set(retired((ROOT / name).read_text(encoding="utf-8"), models)))
    return moved + [f"{name}:{line}: {old!r} -> {new}" for line, old, new in found]


FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in SEARCHED
    for path in ROOT.glob(pattern)
    if path.name != "_modidx.py" and path.name != Path(__file__).name
)


def test_something_is_searched():
    assert {"skylar/layers/attention.py", "bench/common.py", "tools/lessons.py"} <= set(FILES)


@pytest.mark.parametrize("name", [name for name in FILES if name not in EXEMPT])
def test_no_retired_words(name):
    assert not findings(name), "\n".join(findings(name))


def test_exempt_files_still_need_it():
    needless = [name for name in EXEMPT if name not in FILES or not findings(name)]
    assert not needless, f"clean or gone, take them off EXEMPT: {needless}"


@pytest.mark.parametrize(
    ("source", "line", "word"),
    [
        ("x = cache.seated", 1, "seated"),
        ("def f():\n    '''One.\n\n    The oracle.\n    '''", 4, "oracle"),
        ("# a twin of the model", 1, "twin"),
        ("raise ValueError(f'{x} is not a colour')", 1, "colour"),
        ("def initialise(): ...", 1, "initialise"),
        ("denormalised = 1", 1, "denormalised"),
        ("class RingCache: ...", 1, "RingCache"),
        ("PackedLinear = 1", 1, "PackedLinear"),
        ("NOBODY = -1", 1, "NOBODY"),
    ],
)
def test_retired_words_are_noticed(source, line, word):
    assert (line, word) in {(found, old) for found, old, _ in retired(source)}


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("# Attention\n\nThe model speaks.", 3, "model speaks"),
        ("Each word\nlistens to others.", 2, "listens"),
        ("What a token\nasks.", 1, "token asks"),
        ("one — two", 1, "—"),
        ("one – two", 1, "–"),
        ("| share of attention | colour |", 1, "share of attention"),
        ("```mermaid\n  A[\"who hears\"]\n```", 2, "hears"),
        ("```python\nx\n```\n\n$$y$$ the entrance", 5, "entrance"),
    ],
)
def test_retired_words_in_a_text_are_noticed(text, line, word):
    assert (line, word) in {(found, old) for found, old, _ in retired_in_text(text)}


@pytest.mark.parametrize(
    "text",
    [
        "`heard`, $loud$, [a back door](the_world/colour.ipynb), 1–2, said, an answer",
        "A query attends to every earlier key; the attention weight is high.",
        "## In plain words\n\nThink of words like these.",
        "| score | – |",
    ],
)
def test_good_texts_pass(text):
    assert not list(retired_in_text(text))


def test_strings_of_a_lesson_are_text_and_magics_are_no_python():
    source = "%time f()\nax.set_xlabel('share of attention')\ns.arrow(a, b, bend=0.1)"
    assert [(line, old) for line, old, _ in retired_in_lesson(source)] == [
        (2, "share of attention")
    ]


@pytest.mark.parametrize(
    "source",
    [
        "from itertools import accumulate",
        "loader = PackedLoader(packed_sequences=True)",
        "'''Raises, promises, comprises; size, seize, precise; otherwise a coating of labels.'''",
        "slots, capacity = num_sink_tokens, mask_mod",
        "# the optimizer normalizes colors and analyzes behavior in the center",
    ],
)
def test_good_names_pass(source):
    assert not list(retired(source))
