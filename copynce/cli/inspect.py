"""``copynce inspect``"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from copynce.cli.settings_help import Command


def add(commands: argparse._SubParsersAction[Command]) -> None:
    """Make the command known."""
    parser = commands.add_parser(
        "inspect",
        help="one pair of pictures in depth: score, patches, copied region",
        description="Look at one pair: score, where the copy lies in both pictures and how it was moved, affinity of "
        "probed patches and its entropy. Writes inspect.png, inspect.html (click any patch; one file) and "
        "inspect.json. Pixels are those of the stored pictures, EXIF orientation not applied.",
    )
    parser.add_argument("query", type=Path, metavar="A", help="a picture, the likely copy")
    parser.add_argument("reference", type=Path, metavar="B", help="a picture, the likely original")
    parser.add_argument("--model", default="default", metavar="MODEL", help="default, a run, a checkpoint or a weights "
                        "file (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        type=_place,
        metavar="X,Y",
        help="a place of A in pixels whose patch is drawn; may be given again (default: the surest patches)",
    )
    parser.add_argument("--temperature", type=_positive, default=1 / 16, help="of the affinity (default: 1/16)")
    parser.add_argument("--device", default="cpu", help="cpu or a CUDA device (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Look, write the files, print the verdict."""
    import json

    from copynce.cli.console import writing_into
    from copynce.errors import ConfigError
    from copynce.files import atomic_text, whole_file
    from copynce.inspect.inspection import draw_inspection, inspect_pair, inspection_report
    from copynce.inspect.report import write_report
    from copynce.models import load_checkpoint
    from copynce.training import find_model

    out = options.out
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder, or not there yet, but {out} is a file; choose another")
    weights = find_model(options.model)
    seen = inspect_pair(
        load_checkpoint(weights),
        options.query,
        options.reference,
        probes=options.probe,
        temperature=options.temperature,
        device=options.device,
    )
    facts = {
        "query": str(options.query),
        "reference": str(options.reference),
        "model": str(weights),
        "score": seen.score,
        "affinity_entropy": float(seen.entropy.mean()),
        "temperature": seen.temperature,
        **seen.region.to_json(),
        "pixel_correlation": {
            "coarse": round(seen.pixels.coarse, 4),
            "fine": round(seen.pixels.fine, 4),
            "blocks": seen.pixels.blocks,
        },
    }
    with writing_into(out):
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / "inspect.png") as file:
            draw_inspection(seen).save(file, format="png")
        write_report(out / "inspect.html", inspection_report(seen))
        with atomic_text(out / "inspect.json") as text:
            json.dump(facts, text, indent=2)
            text.write("\n")
    region = seen.region
    print(f"{seen.score_name}: {seen.score:.4f}")
    if region.found:
        mirrored = ", mirrored" if region.mirrored else ""
        print(f"copied: {region.query_share:.0%} of {options.query}, {region.reference_share:.0%} of "
              f"{options.reference}{mirrored}")  # fmt: skip
    else:
        print("copied: place unknown, too little speaks for one place")
    print(f"{region.inliers} of {region.matches} matches agree, evidence {region.evidence:.0f} nats")
    print(f"pixels agree: {seen.pixels.coarse:.2f} coarsely, {seen.pixels.fine:.2f} finely, in {seen.pixels.blocks} "
          "blocks")  # fmt: skip
    print(f"picture, page, numbers: {out / 'inspect.png'}, {out / 'inspect.html'}, {out / 'inspect.json'}")


def _place(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a place in pixels as X,Y, got {text!r}") from None
    return x, y


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
