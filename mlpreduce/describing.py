"""What a transform, a criterion, a recipe or a search space is: every option with its default, its meaning, its source."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mlpreduce.errors import ReductionError, call_text, did_you_mean
from mlpreduce.words.console import Column, Grid, width, wrapped
from mlpreduce.words.markup import html_table
from mlpreduce.words.values import Config

__all__ = ["Description", "Option", "describe", "described"]


@dataclass(frozen=True)
class Option:
    """One option: its name, its default as Python prints it, and what it means."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True, repr=False)
class Description:
    """What a name stands for, ready to be printed.

    Attributes:
        name: what users write.
        kind: "transform", "criterion", "recipe" or "search space".
        summary: one sentence.
        options: in order, as they are declared; of a recipe, the keys that it sets.
        facts: further lines, each with its name: of a criterion what it looks at, of a recipe its variants.
        source: the paper or rule behind it, and where this differs.
    """

    name: str
    kind: str
    summary: str
    options: tuple[Option, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    source: str = ""

    def __repr__(self) -> str:
        count = len(self.options)
        return f"<{self.kind} {self.name}: {count} option{'' if count == 1 else 's'}; print it>"

    def __str__(self) -> str:
        columns = width()
        lines = [wrapped(f"{self.kind} {self.name}: {self.summary}", columns)]
        lines += [wrapped(f"{name}: {text}", columns) for name, text in self.facts]
        if self.options:
            names = Column("option", [option.name for option in self.options], left=True)
            defaults = Column(self._second, [option.default for option in self.options], left=True)
            meanings = Column("meaning", [option.meaning for option in self.options], text=True)
            lines += ["", Grid("", [names, defaults, meanings], ruled=False).text(columns)]
        if self.source:
            lines += ["", wrapped(f"source: {self.source}", columns)]
        return "\n".join(lines)

    @property
    def _second(self) -> str:
        """The header of the second column: a recipe sets its options, the others have defaults."""
        return "value" if self.kind == "recipe" else "default"

    def _repr_html_(self) -> str:
        rows = [(option.name, option.default, option.meaning) for option in self.options]
        table = html_table(("option", self._second, "meaning"), rows) if rows else ""
        told = [f"{self.kind} {self.name}: {self.summary}", *(f"{name}: {text}" for name, text in self.facts)]
        source = f"<p>source: {escape(self.source)}</p>" if self.source else ""
        return "".join(f"<p>{escape(line)}</p>" for line in told) + table + source


def describe(name: str) -> Description:
    """Describe a transform, a criterion, a recipe or a search space by its name.

    Of equal names a transform goes first, then a criterion, a recipe, a search space; `mlpreduce list NAME` shows all.

    Raises:
        ReductionError: nothing has this name; the message has the nearest one.

    Example:
        >>> describe("thin")
        <transform thin: 1 option; print it>
        >>> describe("thin").options[0]
        Option(name='mlp_ratio', default='2.0', meaning="hidden width over embedding width; timm's ViTs have 4.")
    """
    return described(name)[0]


def described(name: str) -> list[Description]:
    """Describe all that has a name, as `describe` does."""
    from mlpreduce.criteria import list_criteria
    from mlpreduce.recipe import list_recipes
    from mlpreduce.search.spaces.space import list_spaces
    from mlpreduce.transforms import list_transforms

    known: dict[str, Any] = {
        "transform": list_transforms(),
        "criterion": list_criteria(),
        "recipe": list_recipes(),
        "search space": list_spaces(),
    }
    make = {"transform": _transform, "criterion": _criterion, "recipe": _recipe, "search space": _space}
    found = [make[kind](name) for kind, names in known.items() if name in names]
    if not found:
        every = {option for names in known.values() for option in names}
        raise ReductionError(f"describe({name!r}): nothing has this name{did_you_mean(str(name), every)}")
    return found


def _transform(name: str) -> Description:
    from mlpreduce.transforms import get_transform

    transform = get_transform(name)
    keeps = {
        "exact": "nothing but rounding changes what the model computes",
        "at_init": "with the default options the model computes the same until it is trained",
        "no": "",
    }[transform.preserves]
    facts = [("when", "it acts when the model is built: mlpreduce.create_model")] if transform.construction else []
    facts += [("what it keeps", keeps)] if keeps else []
    defaults = {key: parameter.default for key, parameter in transform.parameters.items()}
    return _of_function(name, "transform", transform.function, defaults, facts)


def _criterion(name: str) -> Description:
    from mlpreduce.criteria import get_criterion

    criterion = get_criterion(name)
    looks = {
        "nothing": "nothing: it works without weights",
        "weights": "the weights",
        "images": "calibration images",
        "loss": "calibration images and a loss",
        "gates": "gates that are learned on calibration images",
        "moments": "means and variances of the units on calibration images",
        "pairs": "second moments of all pairs of units on calibration images",
    }[criterion.needs]
    return _of_function(name, "criterion", criterion.function, criterion.options, [("looks at", looks)])


def _recipe(name: str) -> Description:
    from mlpreduce.recipe import Recipe, list_recipes, load
    from mlpreduce.recipe.shelf import header
    from mlpreduce.words.values import flatten

    recipe = load(name)
    summary, facts = _header(header(list_recipes()[name]))
    for variant, steps in recipe.variants.items():
        calls = [call_text(step["transform"], {k: v for k, v in step.items() if k != "transform"}) for step in steps]
        facts.append((f"variant {variant}", ", ".join(calls) or "as it is"))
    if recipe.sweep:
        facts.append(("points of the sweep", ", ".join(recipe.sweep)))
    default = flatten(Recipe(name="").model_dump(mode="json"))
    mine = flatten(recipe.model_dump(mode="json", exclude={"name", "variants", "sweep"}, exclude_unset=True))
    options = [
        Option(key, repr(value), "as by default" if key in default and default[key] == value else _other(default, key))
        for key, value in mine.items()
    ]
    return Description(name, "recipe", summary, tuple(options), tuple(facts))


def _header(lines: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """What a recipe's header says before its first label, and the text under each label, all of its lines joined."""
    told: list[list[str]] = [[]]
    for line in lines:
        if _LABELLED.match(line):
            told.append([])
        told[-1].append(line)
    facts = []
    for first, *others in told[1:]:
        label, _, text = first.partition(":")
        joint = " && " if label == "Command" else " "  # each line of it is a command
        facts.append((label.lower(), joint.join([text.strip(), *others])))
    return " ".join(told[0]), facts


def _other(default: Config, key: str) -> str:
    return f"{default[key]!r} by default" if key in default else "an argument of the model"


def _space(name: str) -> Description:
    from mlpreduce.search.spaces.space import list_spaces

    path = Path(list_spaces()[name])
    document = inspect.cleandoc(_docstring(path.read_text(encoding="utf-8")))
    summary, _, rest = document.partition("\n\n")
    facts = (("file", str(path)), ("run it", f"mlpreduce search {name} --recipe digits"))
    return Description(name, "search space", _line(summary), (), facts, _line(rest))


def _docstring(source: str) -> str:
    import ast

    return ast.get_docstring(ast.parse(source)) or ""


_LABELLED = re.compile(r"[A-Z]\w*:\s")


def _of_function(name: str, kind: str, function: Any, defaults: Config, facts: list[tuple[str, str]]) -> Description:
    """A registered function, from its docstring: summary, meanings of its options, and the source of its module."""
    document = inspect.getdoc(function) or ""
    meanings = dict(_arguments(document))
    options = tuple(
        Option(key, repr(default), meanings.get(key, "no description")) for key, default in defaults.items()
    )
    module = sys.modules.get(function.__module__)
    source = _source(document) or _source(inspect.getdoc(module) or "")
    return Description(name, kind, document.partition("\n")[0], options, tuple(facts), source)


def _arguments(document: str) -> Iterator[tuple[str, str]]:
    """The names and meanings under `Args:` of a docstring in Google style."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", document, re.MULTILINE)
    if section is None:
        return
    lines = inspect.cleandoc("\n" + section[1]).split("\n")
    name = ""
    words: list[str] = []
    for line in lines:
        begin = re.match(r"(\w+): ?(.*)", line)
        if begin:
            if name:
                yield name, _line(" ".join(words))
            name, words = begin[1], [begin[2]]
        else:
            words.append(line)
    if name:
        yield name, _line(" ".join(words))


def _source(document: str) -> str:
    """The paragraph that begins with `Source:`."""
    found = re.search(r"^Source:\s*(.*?)(?:\n\s*\n|\Z)", document, re.MULTILINE | re.DOTALL)
    return _line(found[1]) if found else ""


def _line(text: str) -> str:
    return " ".join(text.split())
