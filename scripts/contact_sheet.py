"""Draw every edit on one sheet: the picture, its edited view, and the source's grid carried through the table.

python scripts/contact_sheet.py --out docs/edits.jpg                  # made pictures, one minute on a CPU
python scripts/contact_sheet.py a.jpg b.jpg c.jpg --out sheet.png     # your own, at least 200 x 230 pixels each
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from copynce.data.synthetic import make_pictures
from copynce.inspect.contact_sheet import contact_sheet


def main() -> None:
    """Read the command line and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE", help="at least two; none: made ones")
    parser.add_argument("--out", type=Path, default=Path("edits.jpg"), help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sheet = contact_sheet(arguments.pictures or make_pictures(folder, 12, seed=5))
    sheet.save(arguments.out, quality=82)
    print(f"{arguments.out}: {sheet.width} x {sheet.height} pixels, {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
