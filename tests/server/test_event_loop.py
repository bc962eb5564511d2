"""The event loop of a server, and the heap that it keeps from garbage collection."""

import subprocess
import sys

PROGRAM = """
import gc
from steer_service.server.event_loop import kept_heap

class Node: pass

node = Node()
node.itself = node
number = id(node)
del node
before = len(gc.get_objects())
thresholds = gc.get_threshold()
with kept_heap():
    assert gc.get_threshold() > thresholds
    assert gc.get_freeze_count() > 0.9 * before, (gc.get_freeze_count(), before)
    assert len(gc.get_objects()) < 0.1 * before
assert gc.get_freeze_count() == 0
assert gc.get_threshold() == thresholds
assert number not in map(id, gc.get_objects())
"""


def test_what_is_loaded_is_kept_from_collections_and_garbage_is_not() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
