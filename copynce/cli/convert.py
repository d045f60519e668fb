"""``copynce convert``"""

from __future__ import annotations

import argparse
from pathlib import Path

from copynce.cli.settings_help import Command, settings_help

_DESCRIPTION = """\
Write the model of one file into another. The name of OUT says the form: .safetensors (ours), .pth.tar (released), a
folder (model.safetensors, config.json, a card), .onnx or .pt2 (a program, compared with the model). IN is a released
file, a file, run or checkpoint of ours or, with --as, any vision transformer or ResNet to start from (DINO, DINOv2,
torchvision, timm; the word timm: timm's own weights): its blocks, position embedding and head go where they fit, and
what went where is printed.
"""


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "convert",
        help="a model's file in another form, or a backbone as a start",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="a weights file, a run or one of its checkpoints")
    parser.add_argument("target", metavar="OUT", help="what is written")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with --as: settings of the model")
    parser.add_argument(
        "--as", dest="kind", choices=["descriptor", "matcher"], help="start this kind of model with the weights of IN"
    )
    parser.add_argument("--num-heads", type=int, help="attention heads of a file that does not tell them")
    parser.add_argument(
        "--part",
        choices=["descriptor", "tokens", "pair", "encode", "fuse"],
        help="what of a descriptor (descriptor, or tokens too) or a matcher (pair, or its halves) becomes a program",
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="how far a program may differ from the model (default .0001)"
    )
    parser.settings = _settings
    parser.more_help = _settings_of_a_matcher
    parser.set_defaults(run=run)


def _settings() -> type:
    from copynce.models.settings import DescriptorConfig

    return DescriptorConfig


def _settings_of_a_matcher() -> str:
    from copynce.models.settings import MatcherConfig

    return settings_help(MatcherConfig).replace("settings:", "settings with --as matcher:", 1)


def run(options: argparse.Namespace) -> None:
    """Convert, and print what went where."""
    from copynce.models.convert import convert
    from copynce.training import find_model

    source = find_model(options.source) if Path(options.source).is_dir() else options.source
    done = convert(
        source,
        options.target,
        options.kind,
        options.overrides,
        num_heads=options.num_heads,
        part=options.part,
        tolerance=options.tolerance,
    )
    for line in (*done.moved, *done.said):
        print(line)
    print(f"written: {options.target}")
