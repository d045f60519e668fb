"""Put this environment's packages that are the same files for every Python into another: ``share_packages.py SITE``.

These are mostly CUDA's libraries and DALI, five of eight gigabytes. They are linked, not copied, with what pip notes
about them, so that ``pip install`` in the other environment takes them for installed and brings the rest.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

site = Path(sys.argv[1])
for package in importlib.metadata.distributions():
    tags = [line.split()[1] for line in (package.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
    if not tags or not all(tag.startswith("py3-none-") for tag in tags) or package.read_text("direct_url.json"):
        continue  # compiled for this Python, or no wheel, or the project itself
    for file in package.files or ():
        source = Path(str(package.locate_file(file)))
        if ".." in file.parts or file.suffix == ".pyc" or not source.is_file():
            continue  # scripts name their Python
        target = site / file
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
