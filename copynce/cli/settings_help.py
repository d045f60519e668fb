"""The settings of a command as text for ``--help``, read off the class that holds them."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any


class Command(argparse.ArgumentParser):
    """A command whose help lists the ``settings`` class that this returns, which is imported only for that, and then
    what ``more_help`` returns."""

    settings: Callable[[], type] | None = None
    more_help: Callable[[], str] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but ``key=value`` may stand behind an option too."""
        options, rest = super().parse_known_args(args, namespace)
        if hasattr(options, "overrides"):
            options.overrides = [*options.overrides, *(text for text in rest if not text.startswith("-"))]
            rest = [text for text in rest if text.startswith("-")]
        return options, rest

    def format_help(self) -> str:
        if self.settings is not None:
            self.description = textwrap.fill(self.description or "", _width())
            parts = [settings_help(self.settings()), self.more_help() if self.more_help is not None else ""]
            self.epilog = "\n\n".join(part for part in parts if part)
        return super().format_help()


def settings_help(kind: type) -> str:
    """The settings of a config class as text: name, default, sentence."""
    from copynce.config import section_choices, section_classes, setting_types

    lines = ["settings:"]
    known: set[str] = set()

    def walk(cls: Any, prefix: str, choices: tuple[str, Mapping[str, type]] | None) -> None:
        types, notes, others = setting_types(cls), _owners(choices), _other_defaults(choices)
        sentences: dict[str, str] = {}
        for base in reversed(cls.__mro__[:-1]):
            sentences |= _field_sentences(base)
        for f in fields(cls):
            name = f"{prefix}{f.name}"
            if classes := section_classes(types[f.name]):
                for section in classes:  # what one has beyond those before it is listed after them
                    walk(section, f"{name}.", section_choices(f))
                continue
            if name in known:
                continue
            known.add(name)
            values = "; ".join([_default(f), *others.get(f.name, [])])
            lines.extend(_indented(f"{name} ({values})", first="  "))
            lines.extend(_indented(" ".join([*notes.get(f.name, []), sentences.get(f.name, "")])))

    walk(kind, "", None)
    return "\n".join(lines)


def _owners(choices: tuple[str, Mapping[str, type]] | None) -> dict[str, list[str]]:
    """{field: [with which values of the choosing setting it is there]}, of those that are not always there."""
    if choices is None:
        return {}
    setting, classes = choices
    names = {value: {f.name for f in fields(kind)} for value, kind in classes.items()}
    everywhere = set.intersection(*names.values())
    return {
        name: [f"With {setting}={' or '.join(value for value in names if name in names[value])}."]
        for name in set.union(*names.values()) - everywhere
    }


def _other_defaults(choices: tuple[str, Mapping[str, type]] | None) -> dict[str, list[str]]:
    """{field: [its default with which value of the choosing setting]}, where that is not the first class's."""
    if choices is None:
        return {}
    setting, classes = choices
    first: dict[str, str] = {}
    found: dict[str, dict[str, list[str]]] = {}  # field: default: values of the setting
    for value, kind in classes.items():
        for f in fields(kind):
            default = _default(f)
            if default != first.setdefault(f.name, default) and f.name != setting.rpartition(".")[2]:
                found.setdefault(f.name, {}).setdefault(default.removeprefix("default "), []).append(value)
    return {
        name: [f"{default} with {setting}={' or '.join(values)}" for default, values in defaults.items()]
        for name, defaults in found.items()
    }


def _default(f: Field[Any]) -> str:
    if f.default is MISSING and f.default_factory is MISSING:
        return "required"
    default = f.default if f.default is not MISSING else {}
    return f"default {'none' if default is None else default}"


def named_list(title: str, entries: Mapping[str, str]) -> str:
    """Names with a sentence each, as text."""
    lines = [f"{title}:"]
    for name, text in entries.items():
        lines += [f"  {name}", *_indented(text)]
    return "\n".join(lines)


def _indented(text: str, first: str = " " * 6) -> list[str]:
    return textwrap.wrap(text, _width(), initial_indent=first, subsequent_indent=" " * 6)


def _width() -> int:
    """Columns of the terminal, as far as lines of text should use them."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 40), 106)


def _field_sentences(kind: type) -> dict[str, str]:
    """The string that stands under each field of a dataclass, which Python itself does not keep."""
    import ast
    import inspect

    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field_node, text_node in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field_node, ast.AnnAssign)
            and isinstance(field_node.target, ast.Name)
            and isinstance(text_node, ast.Expr)
            and isinstance(text_node.value, ast.Constant)
        ):
            found[field_node.target.id] = " ".join(str(text_node.value.value).split())
    return found
