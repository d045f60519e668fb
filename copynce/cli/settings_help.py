"""The settings of a command as text for ``--help``, read off the class that holds them."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any


class Command(argparse.ArgumentParser):
    """A command whose help lists the ``settings`` class that this returns, which is imported only for that."""

    settings: Callable[[], type] | None = None

    def format_help(self) -> str:
        if self.settings is not None:
            self.description = textwrap.fill(self.description or "", _width())
            self.epilog = settings_help(self.settings())
        return super().format_help()


def settings_help(kind: type) -> str:
    """The settings of a config class as text: name, default, sentence."""
    from copynce.config import setting_types

    lines = ["settings:"]

    def walk(cls: Any, prefix: str) -> None:
        sentences, types = _field_sentences(cls), setting_types(cls)
        for f in fields(cls):
            if is_dataclass(types[f.name]):
                walk(types[f.name], f"{prefix}{f.name}.")
                continue
            required = f.default is MISSING and f.default_factory is MISSING
            default = f.default if f.default is not MISSING else {}
            shown = "required" if required else f"default {'none' if default is None else default}"
            lines.append(f"  {prefix}{f.name} ({shown})")
            if sentences.get(f.name):
                lines.extend(
                    textwrap.wrap(sentences[f.name], _width(), initial_indent=" " * 6, subsequent_indent=" " * 6)
                )

    walk(kind, "")
    return "\n".join(lines)


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
