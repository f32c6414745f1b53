"""`python -m trident_gateway` is the command `trident-gateway`."""

import sys

from trident_gateway.cli import main

sys.exit(main())
