import sys

from copynce.cli import main

sys.exit(main())
