"""`python -m fastnorm`: the same as the `fastnorm` command."""

import sys

from fastnorm.cli import main

sys.exit(main())
