"""Files mapped into memory."""

import sys
from typing import Any

MMAP_WITHOUT_FD: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
"""Arguments of `mmap.mmap` with which a mapping keeps no file open; before Python 3.13 each keeps one."""
