"""`python -m trident_client.cli`: the same as `trident`."""

import sys

from trident_client.cli import main

sys.exit(main())
