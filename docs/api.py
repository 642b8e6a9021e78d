"""API pages: of each module its public names, with signature, docstring and parameters in words."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fastcore.docments import docments

EMPTY = inspect.Parameter.empty


def type_name(annotation) -> str:
    """`Tensor | None`, without the packages that the names live in."""
    if annotation is EMPTY:
        return ""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def default_text(value) -> str:
    if value is EMPTY or value is dataclasses.MISSING:
        return ""
    if isinstance(value, type) or callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = repr(value)
    return "..." if len(text) > 60 or " object at " in text or text.startswith("<") else text


def parameters(function) -> list[inspect.Parameter]:
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, or a class that has no signature
        return []
    return [p for p in found if p.name not in ("self", "cls")]


def signature(name: str, function) -> str:
    """`name(a, b=1, *, c)`: one line where it fits, else one parameter a line."""
    pieces, bare_star = [], False
    for p in parameters(function):
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind == p.KEYWORD_ONLY and not bare_star:
            pieces.append("*")
        bare_star |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        default = default_text(p.default)
        pieces.append(f"{star}{p.name}={default}" if default else f"{star}{p.name}")
    line = f"{name}({', '.join(pieces)})"
    return line if len(line) <= 80 else f"{name}(\n    " + ",\n    ".join(pieces) + ",\n)"


STARRED = re.compile(r"^\s*\*\*?(\w+)\b[^#\n]*#\s*(.*)$", re.M)


def words(function) -> dict[str, str]:
    """What nbdev's comments beside the parameters, and beside the result, say."""
    try:
        found = {name: text for name, text in docments(function).items() if text}
        starred = STARRED.findall(inspect.getsource(function))
    except (OSError, TypeError, AttributeError):  # a class without an own __init__ has no source
        return {}
    for name, text in starred:  # docments takes the comment of the last **name for the result's
        found[name] = text
        if found.get("return") == text:
            del found["return"]
    return found


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if text else ""


def parameter_rows(function) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of each parameter, and of the result where it is explained."""
    meaning = words(function)
    rows = [
        (code(p.name), code(type_name(p.annotation)), code(default_text(p.default)),
         meaning.get(p.name, ""))
        for p in parameters(function)
    ]  # fmt: skip
    if "return" in meaning:
        result = type_name(inspect.signature(function).return_annotation)
        rows.append(("returns", code(result), "", meaning["return"]))
    return rows


def parameter_table(function) -> Iterator[str]:
    """The parameters as a table, without the columns that would be empty."""
    rows = parameter_rows(function)
    columns = zip(("Parameter", "Type", "Default", "Meaning"), *rows)
    kept = list(zip(*(column for column in columns if any(column[1:]))))
    if rows and len(kept[0]) > 1:
        kept.insert(1, (":---",) * len(kept[0]))
        yield "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in kept)


def docstring(thing) -> str:
    text = inspect.cleandoc(thing.__doc__ or "")  # its own: not what torch says of every forward
    made_by_dataclass = dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if made_by_dataclass else text


def own_methods(cls: type) -> list[tuple[str, object]]:
    """Public methods and properties that the class itself defines and explains."""
    public = ((name, x) for name, x in vars(cls).items() if not name.startswith("_"))
    plain = ((name, getattr(x, "__func__", x)) for name, x in public)
    return [
        (n, x) for n, x in plain if inspect.isfunction(x) and (inspect.getdoc(x) or n == "forward")
    ]


def constant(value) -> str:
    """A constant's value; of a long collection its size and its first members."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        shown = ", ".join(code(str(x)) for x in list(value)[:11])
        return f"{len(value)}: {shown}" + (", ..." if len(value) > 11 else "")
    return code(repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:200]}...")


def constants(names: dict[str, object]) -> Iterator[str]:
    if names:
        yield "## Constants"
        rows = (("Name", "Type", "Value"), (":---",) * 3) + tuple(
            (code(name), code(type(value).__name__), constant(value))
            for name, value in names.items()
        )
        yield "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def explained(thing) -> bool:
    return inspect.isclass(thing) or inspect.isroutine(thing)


def entry(name: str, thing, level: str = "##") -> Iterator[str]:
    """One function or class: heading, signature, docstring, parameters, a class's methods."""
    yield f"{level} {name.rpartition('.')[2]}"
    yield f"```python\n{signature(name, thing)}\n```"
    yield docstring(thing)
    yield from parameter_table(thing)
    if inspect.isclass(thing):
        for method_name, method in own_methods(thing):
            yield from entry(f"{name}.{method_name}", method, "###")


def page(module: ModuleType, lessons: list[str]) -> str:
    """The Markdown of a module's page; `lessons` are the notebooks that it is written in."""
    parts = [f"# {module.__name__}", inspect.getdoc(module) or ""]
    links = ", ".join(f"[{Path(lesson).stem}](../{lesson})" for lesson in lessons)
    parts.append(f"Written, proved and measured in {links}.")
    public = {name: getattr(module, name) for name in module.__all__}
    for name in filter(lambda name: explained(public[name]), public):
        parts += entry(name, public[name])
    parts += constants({name: x for name, x in public.items() if not explained(x)})
    return "\n\n".join(part for part in parts if part) + "\n"


def write_pages(lessons: dict[str, list[str]], out: Path) -> list[str]:
    """Write a page for each {module: its notebooks} into `out`; returns the pages' names."""
    out.mkdir(parents=True, exist_ok=True)
    for name, notebooks in lessons.items():
        module = importlib.import_module(f"skylar.{name}")
        (out / f"{name}.md").write_text(page(module, notebooks), encoding="utf-8")
    return list(lessons)
