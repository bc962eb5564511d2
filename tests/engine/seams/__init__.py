"""What this project relies on in vLLM, as checks on vLLM's source: any version can be asked, with or without a device.

test_seams.py asks the installed version, check_vllm_version.py any unpacked one.
"""

from tests.engine.seams import api_server, arguments, worker  # they register their seams
from tests.engine.seams.source import SEAMS, Moved, Seam, Source, require_order, results

__all__ = ["SEAMS", "Moved", "Seam", "Source", "require_order", "results", "arguments", "worker", "api_server"]
