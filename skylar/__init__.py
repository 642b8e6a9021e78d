"""A course and a library in one: language models, written, proved and measured in notebooks.

`skylar.from_pretrained`, `skylar.load_tokenizer`, `skylar.generate` and `skylar.stream` are
imported when they are first used (PEP 562), so that `import skylar` does not import PyTorch.
"""

import importlib

__version__ = "0.1.0"

_LAZY = {
    "from_pretrained": "skylar.models.hub",
    "load_tokenizer": "skylar.models.hub",
    "generate": "skylar.inference.generate",
    "stream": "skylar.inference.generate",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'skylar' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
