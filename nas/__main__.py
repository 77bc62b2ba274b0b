"""`python -m nas` is `edgewise`."""

import sys

from nas.cli import main

sys.exit(main())
