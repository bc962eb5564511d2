"""Files mapped into memory."""

import sys
from typing import Any

MMAP_WITHOUT_FD: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""Arguments of `mmap.mmap` that keep no file descriptor open per mapping; before Python 3.13 each mapping keeps one."""
