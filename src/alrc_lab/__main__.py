"""Make `python -m alrc_lab` the same as `alrc`."""

import sys

from alrc_lab.cli import main

sys.exit(main())
