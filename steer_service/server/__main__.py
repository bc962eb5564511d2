"""`python -m steer_service.server` is the `steer` command."""

import sys

from steer_service.server.cli import main

sys.exit(main())
