"""`python -m trident_export`."""

import sys

from trident_export.cli import main

sys.exit(main())
