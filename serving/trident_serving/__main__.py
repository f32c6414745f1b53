"""`python -m trident_serving`."""

import sys

from trident_serving.launcher.cli import main

sys.exit(main())
