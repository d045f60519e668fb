"""Settings: typed, checked, read from YAML plus ``key=value``. Each class of settings stands beside its owner.

What is written is text until its field says what it is, so no value passes through YAML's guesses: a field of type
``str`` holds what was typed, letter by letter (``2024_11_28``, ``007``, ``yes``, ``a #b``), a number is read as a
number, ``dict`` and ``tuple`` as YAML's ``{a: 1}`` and ``[1, 2]``. A setting that may be none is emptied by ``none`` or
``null``; in a YAML file quotes make those words text again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from copynce.errors import ConfigError

T = TypeVar("T")

_NONE = ("none", "null", "~")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DEEPEST = 20  # lists and mappings in each other
_CHOICE = "copynce: the setting that chooses the section's class"
_NOT_FINITE = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ConfigError unless ``condition``: setting ``name`` must be ``expected``, and ``value`` came."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {_shown(value)}")


def require_number(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> None:
    """Raise ConfigError unless ``value`` lies between the bounds that are given; infinity only where ``infinite``."""
    inside = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
        and not math.isnan(value)
    )
    bounds = [
        f"{word} {bound}"
        for word, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    finite = infinite or not math.isinf(value)
    if not finite and inside:
        bounds.append("finite")
    require(inside and finite, name, " and ".join(bounds) or "a number", value)


def section_chosen_by(setting: str, classes: Mapping[str, type]) -> Any:
    """A field of settings, itself a section, whose class follows from the value of ``setting`` (a dotted name, from the
    top): that of ``classes`` under this value, the first one where it is not given. Annotate the field with the union
    of the classes."""
    return dataclasses.field(metadata={_CHOICE: (setting, dict(classes))})


def load_config(kind: type[T], start: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]) -> T:
    """A config object of dataclass ``kind``: what ``start`` says, then ``key=value`` overrides, later ones winning.

    start: a YAML file, or {dotted name: value} as of a named run, or None. A value replaces the one before;
    ``section.key=value`` sets one key of a section or mapping. Raises ConfigError naming the key for anything unknown
    (with the nearest known key), missing, of another type or out of range.
    """
    return build_config(kind, _gathered(kind, start, overrides))


def resolved_text(kind: type[Any], start: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]) -> str:
    """The settings of :func:`load_config` as YAML, where those that must be given may still be missing.

    They are missing in the YAML too, and its first line, a comment, names them; given beside the file they make the
    settings that they make beside ``start``. Errors as in :func:`load_config` but for what is missing.
    """
    missing: list[str] = []
    values = _gathered(kind, start, overrides)
    tree = dataclasses.asdict(_Builder(kind, values, missing).build(kind, values, ""))
    for name in missing:
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        del place[last]
    return (f"# still to be given: {', '.join(missing)}\n" if missing else "") + _yaml(tree)


def _gathered(
    kind: type[Any], start: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Nested values of ``start`` and the overrides, not checked yet."""
    values: dict[str, Any] = {}
    if isinstance(start, Mapping):
        for key, value in start.items():
            place, last = _place(kind, values, key)[:2]
            place[last] = value
    elif start is not None:
        values = _read_file(Path(start))
    for override in overrides:
        key, sign, text = override.partition("=")
        if not (sign and key):
            raise ConfigError(f"settings are given as key=value, got {override!r}")
        _put(kind, values, key, text)
    return values


def build_config(kind: type[T], values: Any) -> T:
    """A config object of dataclass ``kind`` from nested plain values; errors as in :func:`load_config`."""
    return typing.cast(T, _Builder(kind, values).build(kind, values, ""))


def save_config(config: Any, path: Path) -> None:
    """Write all settings as YAML, whole or not at all; :func:`load_config` reads back equal ones."""
    from copynce.files import atomic_text

    with atomic_text(path) as file:
        file.write(config_text(config))


def config_text(config: Any) -> str:
    """All settings as YAML; a file of it, read by :func:`load_config`, gives equal ones."""
    return _yaml(dataclasses.asdict(config))


def setting_types(kind: type) -> dict[str, Any]:
    """The type of every field of a dataclass of settings; a section's is such a dataclass, or a union of them."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def section_classes(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a section of type ``hint`` can be, the default one first; empty for a plain setting."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(parts) if all(dataclasses.is_dataclass(part) for part in parts) else ()


def section_choices(field: dataclasses.Field[Any]) -> tuple[str, Mapping[str, type]] | None:
    """(setting, {its value: class}) of a field made by :func:`section_chosen_by`; None for any other."""
    found: tuple[str, Mapping[str, type]] | None = field.metadata.get(_CHOICE)
    return found


# ------------------------------------------------------------------------------------------------ text to tree


class _Plain(str):
    """Text without quotes: a field that is no text may take it for a number, a boolean or none."""


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected a YAML file of settings")
    tree = _parse(path.read_bytes(), str(path), "a YAML file of settings")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else repr(tree)
        raise ConfigError(f"{path}: expected a YAML mapping of settings, got {kind}")
    return tree


def _parse(text: str | bytes, name: str, expected: str) -> Any:
    """YAML as nested dicts, lists and text, nothing resolved; None for an empty value."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _tree(node, set())
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not {expected} ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not {expected} (not UTF-8: {error.reason})") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: not {expected} (nested too deeply)") from error


def _tree(node: yaml.Node, seen: set[int]) -> Any:
    """A node as plain values; ``seen`` are the lists and mappings so far, each of which may stand in one place only."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.startswith("!"):
            raise yaml.YAMLError(f"tags such as {node.tag} have no meaning here; quote the text")
        if node.style is not None:
            return str(node.value)
        return _Plain(node.value) if node.value else None
    if id(node) in seen:
        raise yaml.YAMLError("an alias of a list or mapping; write it out")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_tree(item, seen) for item in node.value]
    result: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError("a name must be text")
        if key.value in result:
            raise yaml.YAMLError(f"{key.value!r} is given twice")
        result[str(key.value)] = _tree(value, seen)
    return result


def _put(kind: Any, values: dict[str, Any], key: str, text: str) -> None:
    """Set ``key`` (dotted) of nested ``values`` to ``text``, read as the field's type asks."""
    place, last, hint = _place(kind, values, key)
    if _is_structure(hint):
        value = _parse(text, key, f"a value such as {_example(hint)}")
        if section_classes(hint) and isinstance(value, dict) and isinstance(place.get(last), dict):
            value = {**place[last], **value}
    else:
        value = _Plain(text)
    place[last] = value


def _place(kind: Any, values: dict[str, Any], key: str) -> tuple[dict[str, Any], str, Any]:
    """(mapping, name, type) of ``key`` (dotted) in nested ``values``, whose mappings on the way are made if absent."""
    hint, place = kind, values
    *sections, last = key.split(".")
    for depth, name in enumerate(sections):
        hint = _inner(kind, hint, name, key)
        if not isinstance(place.get(name), dict):
            if place.get(name) is not None and section_classes(hint):
                raise ConfigError(f"{'.'.join(sections[: depth + 1])} must be a mapping, got {_shown(place[name])}")
            place[name] = {}
        place = place[name]
    return place, last, _inner(kind, hint, last, key)


def _inner(kind: Any, hint: Any, name: str, key: str) -> Any:
    """The type of what is called ``name`` in something of type ``hint``; one name has one type in all of a union."""
    for section in section_classes(hint):
        known = setting_types(section)
        if name in known:
            return known[name]
    if hint is Any:
        return Any
    if typing.get_origin(hint) is dict:
        return typing.get_args(hint)[1]
    raise _unknown(kind, key)


def _is_structure(hint: Any) -> bool:
    return hint is Any or bool(section_classes(hint)) or typing.get_origin(hint) in (dict, tuple)


def _example(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "[1, 2]"
    return "8, true, text or [1, 2]" if hint is Any else "{name: value}"


# ------------------------------------------------------------------------------------------------ tree to settings


class _Builder:
    """Makes the settings of class ``root`` of nested ``values``.

    ``missing``: takes the names of settings that must be given and are not, in whose places stand words; None: they are
    an error.
    """

    def __init__(self, root: Any, values: Any, missing: list[str] | None = None) -> None:
        self._root, self._values, self._missing = root, values, missing

    def build(self, kind: Any, values: Any, prefix: str) -> Any:
        """The section of class ``kind`` whose names begin with ``prefix``."""
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(f"{prefix.rstrip('.') or 'settings'} must be a mapping of settings, got {_shown(values)}")
        hints = setting_types(kind)
        for name in values:
            if name not in hints:
                raise _unknown(self._root, f"{prefix}{name}")
        found: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            hint, name = hints[field.name], f"{prefix}{field.name}"
            if section_classes(hint):
                inner = values.get(field.name)
                section = self._chosen(field, name, inner) or hint
                found[field.name] = self.build(section, inner, f"{name}.")
            elif field.name in values:
                found[field.name] = _value(hint, values[field.name], name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                if self._missing is None or hint is not str:
                    raise ConfigError(f"{name} must be given, for example {name}=VALUE")
                self._missing.append(name)
                found[field.name] = "VALUE"
        try:
            return kind(**found)
        except ConfigError:
            raise
        except ValueError as error:  # of a class that others use without settings
            raise ConfigError(f"{prefix}{error}") from error

    def _chosen(self, field: dataclasses.Field[Any], name: str, values: Any) -> type | None:
        """The class that a setting chooses for section ``name``, all of whose ``values`` must be settings of it."""
        choices = section_choices(field)
        if choices is None:
            return None
        setting, classes = choices
        choice: Any = self._values
        for part in setting.split("."):
            choice = choice.get(part) if isinstance(choice, dict) else None
        choice = next(iter(classes)) if choice is None else choice
        require(isinstance(choice, str) and choice in classes, setting, f"one of {', '.join(classes)}", choice)
        if isinstance(values, dict):
            for key in sorted(values.keys() - setting_types(classes[choice]).keys()):
                owners = [other for other, kind in classes.items() if key in setting_types(kind)]
                if owners:
                    known = " or ".join(f"{setting}={other}" for other in owners)
                    raise ConfigError(f"{name}.{key} is a setting of {known}, not of {setting}={choice}")
        return classes[choice]


def _value(hint: Any, value: Any, name: str) -> Any:
    """``value`` as ``hint`` asks; ConfigError where it is no such thing."""
    if isinstance(hint, types.UnionType):  # X | None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        if value is None or (isinstance(value, _Plain) and value.lower() in _NONE):
            return None
        if isinstance(value, _Plain) and not value:
            raise ConfigError(f"{name} is empty; give a value, or none")
    if value is None and hint is not Any:
        raise ConfigError(f"{name} must be given, for example {name}=VALUE")
    origin = typing.get_origin(hint)
    if hint is str:
        require(isinstance(value, str), name, "text", value)
        if isinstance(value, _Plain) and not value:
            raise ConfigError(f"{name} must not be empty, for example {name}=VALUE")
        require("\0" not in value, name, "text without NUL", value)
        return "".join(value)  # no _Plain
    if origin is Literal:
        choices = typing.get_args(hint)
        require(value in choices, name, f"one of {', '.join(choices)}", value)
        return "".join(value)
    if hint is bool:
        text = str(value).strip().lower()
        require(text in _BOOLS, name, "true or false", value)
        return _BOOLS[text]
    if hint is int:
        return _integer(value, name)
    if hint is float:
        return _float(value, name)
    if origin is tuple:
        parts = typing.get_args(hint)
        fits = isinstance(value, (list, tuple)) and len(value) == len(parts)
        require(fits, name, f"a list of {len(parts)} values such as {[0.9] * len(parts)}", value)
        return tuple(_value(part, item, name) for part, item in zip(parts, value, strict=True))
    if origin is dict:
        require(isinstance(value, dict), name, "a mapping such as {name: value}", value)
        inner = typing.get_args(hint)[1]
        return {str(key): _value(inner, item, f"{name}.{key}") for key, item in value.items()}
    if hint is Any:
        return _guess(value, name)
    raise TypeError(f"{name}: settings of type {hint} are not read")  # ours to mend


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        text = value.strip() if isinstance(value, str) else ""
        require(_INTEGER.fullmatch(text) is not None and len(text) < 100, name, "a whole number", value)
        number = int(text.replace("_", ""))
    require(abs(number) < 1 << 63, name, "a whole number of at most 63 bits", value)
    return number


def _float(value: Any, name: str) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1 << 63 or isinstance(value, float) else math.inf
    elif isinstance(value, str):
        text = value.strip().lower()
        if _FLOAT.fullmatch(text):
            number = float(text.replace("_", ""))
        elif text.lstrip("+-").removeprefix(".") in ("inf", "infinity"):
            number = -math.inf if text.startswith("-") else math.inf
    require(not math.isnan(number), name, "a number", value)
    return number


def _guess(value: Any, name: str, depth: int = 0) -> Any:
    """The value of a mapping whose types are the owner's: text without quotes may be none, a boolean or a number."""
    require(depth < _DEEPEST, name, f"nested at most {_DEEPEST} times", value)
    if isinstance(value, dict):
        return {str(key): _guess(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guess(item, name, depth + 1) for item in value]
    if not isinstance(value, _Plain):
        return value
    text = "".join(value)
    if text.lower() in _NONE:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return _integer(text, name)
    if _FLOAT.fullmatch(text):
        return _float(text, name)
    return _NOT_FINITE.get(text.lower(), text)


def _unknown(root: Any, key: str) -> ConfigError:
    everything = _all_keys(root, "")
    near = difflib.get_close_matches(key, everything, n=3, cutoff=0.5)
    # A key given without its section, or in the wrong one.
    near += [name for name in everything if name.split(".")[-1] == key.split(".")[-1] and name not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(everything)}"
    return ConfigError(f"unknown setting {key}; {hint}")


def _all_keys(root: Any, prefix: str) -> list[str]:
    keys: dict[str, None] = {}  # in order, each once
    for name, hint in setting_types(root).items():
        sections = section_classes(hint)
        for section in sections:
            keys |= dict.fromkeys(_all_keys(section, f"{prefix}{name}."))
        if not sections:
            keys[f"{prefix}{name}"] = None
    return list(keys)


def _shown(value: Any) -> str:
    """A value as it was typed."""
    text = repr("".join(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


# ------------------------------------------------------------------------------------------------ settings to text


def _yaml(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever it could be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    words = (*_NONE, *_BOOLS, *_NOT_FINITE)
    read_as_text = text.isascii() and text.isprintable() and text.lower() not in words
    read_as_text = read_as_text and not (_INTEGER.fullmatch(text) or _FLOAT.fullmatch(text))
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if read_as_text else '"')


_Dumper.add_representer(str, _represent_text)
