"""Run the command line as `python -m molf`."""

import sys

from molf.cli import main

sys.exit(main())
