"""timm's own pretrained weights by name: `timm`, those of the model's backbone, or `timm:NAME.TAG`."""

from __future__ import annotations

import difflib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from copynce.errors import ConfigError, DataError

_PREFIX = "timm"
_FILE = "model.safetensors"
_PATIENCE = 10  # seconds until the hub must have answered


def weights_file(weights: str | Path, backbone: str) -> Path:
    """The file or folder that `weights` means, fetched or found in the hub's cache where it names timm's own.

    backbone: the timm name for which `timm` alone stands. Raises ConfigError if timm has no such weights, DataError if
    they cannot be fetched.
    """
    if weights != _PREFIX and not str(weights).startswith(f"{_PREFIX}:"):
        return Path(weights)
    return _fetched(str(weights).partition(":")[2] or backbone)


def _fetched(name: str) -> Path:
    import timm
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    known = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name) else None
    if known is None or not known.hf_hub_id:
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise ConfigError(f"weights: timm has no pretrained weights called {name}{hint}")
    repository, _, revision = known.hf_hub_id.partition("@")
    place: dict[str, Any] = {
        "repo_id": repository,
        "filename": known.hf_hub_filename or _FILE,
        "revision": revision or None,
    }
    try:
        return Path(hf_hub_download(**place, local_files_only=True))
    except OSError:
        pass  # not in the cache
    try:
        # The hub's own client tries for half a minute before it says that there is no network.
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_PATIENCE):
            pass
    except urllib.error.HTTPError:
        pass  # it has answered
    except OSError as error:
        raise DataError(f"{_unreachable(name, repository)} ({error})") from error
    try:
        return Path(hf_hub_download(**place, etag_timeout=_PATIENCE))
    except (OSError, HfHubHTTPError) as error:
        raise DataError(f"{_unreachable(name, repository)} ({str(error).strip().splitlines()[0]})") from error


def _unreachable(name: str, repository: str) -> str:
    return (
        f"timm's weights of {name} cannot be fetched from {repository}; where there is no network, fetch its {_FILE} "
        "elsewhere and name that file"
    )
