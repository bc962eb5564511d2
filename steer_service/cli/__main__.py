"""`python -m steer_service.cli` is the `steer` command."""

import sys

from steer_service.cli.main import main

sys.exit(main())
