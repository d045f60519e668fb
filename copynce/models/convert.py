"""Models from one file into another: released and ours, backbones of others as starts, programs for other runtimes.

The form of what is written follows from its name: `.safetensors` ours, `.pth.tar` released, `.onnx` and `.pt2`
programs, and a folder for any other name without a suffix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from copynce.config import load_config
from copynce.errors import ConfigError
from copynce.files import file_sha256
from copynce.models.check import check_model
from copynce.models.checkpoints import (
    load_checkpoint,
    own_config,
    read_checkpoint_metadata,
    save_checkpoint,
    start_card,
)
from copynce.models.export import FORMS, TOLERANCE, export
from copynce.models.kinds import KINDS, AnyModel, backbone_fields, build_model, heads_unknown
from copynce.models.matcher import Matcher
from copynce.models.names import (
    LOG_SCALE,
    Model,
    count_blocks,
    find_encoder,
    is_matcher,
    is_resnet,
    modules_of,
    moves,
)
from copynce.models.pretrained import require_place
from copynce.models.released import save_released
from copynce.models.settings import BackboneConfig, MatcherConfig
from copynce.models.starts import begin, unseen
from copynce.models.timm_weights import weights_file
from copynce.models.weight_files import WeightFile, read_weights

_RELEASED = (".pth.tar", ".pth", ".pt")
_SEED = 123  # of parts that no file gives


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did, as lines for people."""

    moved: list[str]
    """`theirs -> ours`, whole modules and runs of blocks in one."""
    said: list[str]
    """Sentences about what was taken, is new, was left, or has no place in the new form."""


def convert(
    source: str | Path,
    target: str | Path,
    kind: Literal["descriptor", "matcher"] | None = None,
    settings: Sequence[str] = (),
    *,
    num_heads: int | None = None,
    part: str | None = None,
    tolerance: float = TOLERANCE,
) -> Conversion:
    """Write the model of one file into another.

    source: what `load_checkpoint` or, with `kind`, `load_start` takes, or timm's own weights (`timm`,
    `timm:NAME.TAG`). target: see the module's text. kind: what to start with the file's weights, where it is not a
    model taken as it is. settings: `key=value` of that model's config; what they leave out follows from the file.
    num_heads: attention heads of a file that does not tell them; with `kind`, the settings may tell them too.
    part, tolerance: of a program, as `export` takes them.
    Raises ConfigError for settings, DataError for files, ExportError for programs, WriteError if the disk takes none.
    """
    target = Path(target)
    form = _form(target)
    if form == "folder":
        require_place(target)
    file = read_weights(weights_file(source, _backbone(kind, settings)))
    if target.exists() and target.resolve() == file.path.resolve():
        raise ConfigError(f"{target} is the file itself; choose another name for what is written")
    if part is not None and form != "program":
        raise ConfigError(f"part={part} is that of a program, and {target} is none ({' or '.join(FORMS)})")
    if kind is None and settings:
        raise ConfigError(
            f"a model is taken as it is, so settings such as {settings[0]} have no place; say what to start with "
            "the file's weights: --as descriptor or --as matcher"
        )
    model, metadata, done = _whole(file, num_heads) if kind is None else _started(file, kind, settings, num_heads)
    if form == "released":
        done.said.extend(save_released(target, model, metadata))
    elif form == "program":
        difference = export(model, target, part, tolerance=tolerance)
        done.said.append(f"largest difference from the model: {difference:.2g} (at most {tolerance:g})")
    elif form == "folder":
        model.save_pretrained(target, metadata)
    else:
        save_checkpoint(target, model, metadata)
    return done


def _backbone(kind: str | None, settings: Sequence[str]) -> str:
    """The backbone whose weights `timm` alone means."""
    given = [text.partition("=")[2] for text in settings if text.startswith("backbone=")]
    return given[-1] if given else KINDS[kind or "descriptor"].config().backbone


def _form(target: Path) -> str:
    name = target.name.lower()
    if name.endswith(".safetensors"):
        return "ours"
    if name.endswith(_RELEASED):
        return "released"
    if name.endswith(FORMS):
        return "program"
    if target.is_dir() or not target.suffix:
        return "folder"
    raise ConfigError(
        f"{target}: expected a name that ends in .safetensors (ours), {_RELEASED[0]} (released), "
        f"{' or '.join(FORMS)} (programs), or a folder, got "
        f"{target.suffix}"
    )


def _whole(file: WeightFile, num_heads: int | None) -> tuple[AnyModel, dict[str, Any], Conversion]:
    """The model of a file as it is, its metadata, and what was taken."""
    found = find_encoder(file)
    model = load_checkpoint(file.path, num_heads=num_heads)
    _require_heads(model, num_heads, str(file.path))
    said = [f"{file.path}: a {_described(model)}"]
    if own_config(file) is None:
        metadata = _released_metadata(file, found)
        said += [f"beside it: {name} {metadata[name]:g}" for name in ("epoch", LOG_SCALE) if name in metadata]
    else:
        metadata = read_checkpoint_metadata(file.path) if file.texts else {}
    state = model.state_dict()
    types = {str(tensor.dtype) for tensor in found.tensors.values() if tensor.is_floating_point()} - {"torch.float32"}
    said += [f"its {name.removeprefix('torch.')} weights are converted to float32" for name in sorted(types)]
    taken = {name: found.names[name] for name in state if name in found.names}
    new = [name for name in state if name not in taken]
    said += [f"new: {', '.join(modules_of(new))}"] if new else []
    return model, metadata, Conversion(moves(taken), said)


def _released_metadata(file: WeightFile, found: Model) -> dict[str, Any]:
    """What a released file tells beside its model."""
    metadata: dict[str, Any] = {"converted_from": {"file": file.path.name, "sha256": file_sha256(file.path)}}
    if "epoch" in file.numbers:
        metadata["epoch"] = int(file.numbers["epoch"])
    if LOG_SCALE in found.tensors and found.tensors[LOG_SCALE].numel() == 1:
        metadata[LOG_SCALE] = float(found.tensors[LOG_SCALE])
    return metadata


def _started(
    file: WeightFile, kind: str, settings: Sequence[str], num_heads: int | None
) -> tuple[AnyModel, dict[str, Any], Conversion]:
    """A new model that has taken a file's weights as far as they fit, its metadata, and what was taken."""
    if kind not in KINDS:
        raise ConfigError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    config = start_config(file, kind, settings, num_heads)
    check_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = build_model(config)
    _require_heads(model, num_heads, f"{file.path} or a setting")
    start = begin(model, file.path)
    listed = {"new": modules_of(start.new), "left aside": modules_of(start.left)}
    said = [f"a {_described(model)}", *(text for text in start.said if text.partition(":")[0] not in listed)]
    said += [f"{title}: {', '.join(names)}" for title, names in listed.items() if names]
    return model, {"start": start_card(file.path)}, Conversion(moves(start.taken), said)


def start_config(file: WeightFile, kind: str, settings: Sequence[str], num_heads: int | None) -> BackboneConfig:
    """The config of a model that starts from a file: `settings`, and where they say nothing, what the file tells.
    With `backbone` among them, it tells the options instead of the file.

    Of a backbone of N blocks a matcher takes 8 + 4 if N is 12, else two thirds and the rest; with one of
    `encoder_blocks` and `fusion_blocks` given, the other is what remains.
    """
    found, given = find_encoder(file), {text.partition("=")[0] for text in settings}
    own = own_config(file)
    start: dict[str, Any]
    if own is not None:
        start = {field.name: getattr(own, field.name) for field in dataclasses.fields(BackboneConfig)}
        start.pop("freeze_patch_embed")
        if type(own) is KINDS[kind].config:
            start = own.to_dict()
        start["backbone_options"] = dict(start["backbone_options"])
    else:
        start = backbone_fields(found, file.path, num_heads, bare=True)
        linear = found.tensors.get("heads.linear_head.fc1.weight")
        if linear is not None and kind == "descriptor":
            start["dim"] = linear.shape[0]
    if "backbone" in given:
        start["backbone_options"] = {} if num_heads is None else {"num_heads": num_heads}
    blocks = count_blocks(found.tensors, "encoder")
    if kind == "matcher":
        start["backbone_options"].pop("depth", None)
        start |= _split(found, blocks, given)
    config = load_config(
        KINDS[kind].config, {name: value for name, value in start.items() if name not in given}, settings
    )
    if "backbone_options" in given:  # a mapping that replaces the one before
        options = {**start["backbone_options"], **config.backbone_options}
        config = dataclasses.replace(config, backbone_options=options)
    told = own is not None or "backbone" in given or is_resnet(found.tensors) or "num_heads" in config.backbone_options
    if not told:
        raise heads_unknown(file.path, start["backbone_options"]["embed_dim"])
    if isinstance(config, MatcherConfig) and not is_matcher(found.tensors):
        if "fusion_blocks" not in given:
            config = dataclasses.replace(config, fusion_blocks=max(blocks - config.encoder_blocks, 1))
        elif "encoder_blocks" not in given:
            config = dataclasses.replace(config, encoder_blocks=max(blocks - config.fusion_blocks, 1))
    return config


def _require_heads(model: AnyModel, num_heads: int | None, teller: str) -> None:
    """Raise ConfigError if a number of heads was given, and the model has another."""
    heads = unseen(model).get("num_heads")
    if num_heads is not None and num_heads != heads:
        expected = "a ResNet has none" if heads is None else f"{teller} tells {heads}"
        raise ConfigError(f"num_heads must be left out, for {expected}, got {num_heads}")


def _split(found: Model, blocks: int, given: set[str]) -> dict[str, int]:
    if is_matcher(found.tensors):
        return {"encoder_blocks": blocks, "fusion_blocks": count_blocks(found.tensors, "fusion")}
    return {"encoder_blocks": max(blocks - max(blocks // 3, 1), 1)} if "encoder_blocks" not in given else {}


def _described(model: AnyModel) -> str:
    """A model in a few words."""
    if isinstance(model, Matcher):
        config = model.config
        what = f"matcher, {config.encoder_blocks} encoder blocks and {config.fusion_blocks} fusion blocks"
    else:
        what = f"descriptor of {model.dim} numbers"
    return f"{what}, {model.img_size} px, patches of {model.patch_size} px, {model.channels} channels"
