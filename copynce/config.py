"""Settings: typed, checked, read from YAML plus ``key=value``. Each class of settings stands beside its owner."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copynce.errors import ConfigError

T = TypeVar("T")


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise ConfigError unless ``condition``: setting ``name`` must be ``expected``, and ``value`` came."""
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


def load_config(kind: type[T], path: str | Path | None, overrides: Sequence[str]) -> T:
    """A config object of dataclass ``kind`` from a YAML file (or None) and ``key=value`` overrides, later ones winning.

    Raises ConfigError naming the key for anything unknown (with the nearest known key), missing or out of range.
    """
    settings = OmegaConf.create()
    if path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected a YAML file of settings")
        try:
            loaded = OmegaConf.load(path)
        except Exception as error:  # yaml raises a family of its own, omegaconf another
            raise ConfigError(f"{path}: not a YAML file of settings ({error})") from error
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: expected a YAML mapping of settings, got a list")
        settings = loaded
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"settings are given as key=value, got {override!r}")
    merged = OmegaConf.merge(settings, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    return build_config(kind, OmegaConf.to_container(merged, resolve=True))


def build_config(kind: type[T], values: Any) -> T:
    """A config object of dataclass ``kind`` from nested plain values; errors as in :func:`load_config`."""
    _check_keys(kind, values, "")
    schema = OmegaConf.structured(kind)
    _make_writable(schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = error.full_key or "settings"
        if "mandatory" in str(error).lower() or "missing" in str(error).lower():
            raise ConfigError(f"{key} must be given, for example {key}=VALUE") from error
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def save_config(config: Any, path: Path) -> None:
    """Write the resolved settings as YAML."""
    temporary = path.with_name(f".{path.name}.part")
    OmegaConf.save(OmegaConf.structured(config), temporary)
    temporary.replace(path)


def _check_keys(kind: Any, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'settings'} must be a mapping of settings, got {values!r}")
    known = {f.name: f for f in fields(kind)}
    for name, value in values.items():
        if name not in known:
            everything = _all_keys(kind, prefix)
            near = difflib.get_close_matches(f"{prefix}{name}", everything, n=3, cutoff=0.5)
            # A key given without its section, or in the wrong one.
            near += [key for key in everything if key.split(".")[-1] == str(name) and key not in near]
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(everything)}"
            raise ConfigError(f"unknown setting {prefix}{name}; {hint}")
        inner = known[name].default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            _check_keys(inner, value, f"{prefix}{name}.")


def _all_keys(kind: Any, prefix: str) -> list[str]:
    keys: list[str] = []
    for f in fields(kind):
        inner = f.default_factory
        if isinstance(inner, type) and is_dataclass(inner):
            keys += _all_keys(inner, f"{prefix}{f.name}.")
        else:
            keys.append(f"{prefix}{f.name}")
    return keys


def _make_writable(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes; a schema must take values."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if not OmegaConf.is_missing(node, str(key)) and isinstance(node[key], DictConfig):
            _make_writable(node[key])
