"""The command line: ``copynce COMMAND``; under torchrun it is ``torchrun ... -m copynce.cli train ...``.

Help, the version and wrong arguments import neither torch nor Numba, DALI or faiss: a command imports what it needs
when it runs.
"""

import os

# OpenMP's threads spin while they wait for each other, and so take the processor from DALI's threads and from whoever
# else is there. Read once, when torch loads OpenMP; a policy that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from copynce.cli.main import main

__all__ = ["main"]
