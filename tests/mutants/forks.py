"""Mutants of what keeps a forked process and its parent apart, and of what ends dropped clients."""

from tests.mutants.mutant import Mutant, tests_in

CHILDREN = tests_in("client/test_forks.py", "test_whatever_children_do_none_hangs_or_crashes_and_the_parent_goes_on")
DROPPED = tests_in("client/test_dropped_clients.py", "test_a_program_that_closes_no_client_ends_in_order")

FORKS = (
    Mutant(
        name="gRPC is used in a forked process",
        file="steer_client/forks.py",
        old="    _is_unusable = _is_unusable or _ran\n",
        new="    _is_unusable = False\n",
        why="calls in a child hang for ever, or the child crashes",
        killed_by=CHILDREN,
    ),
    Mutant(
        name="gRPC starts its threads anew in a forked process",
        file="steer_client/forks.py",
        old='os.environ.setdefault(FORK_SUPPORT, "0")',
        new='os.environ.setdefault(FORK_SUPPORT, "1")',
        why="children of a busy process crash at random places, and each fork writes to the standard error",
        killed_by=CHILDREN,
    ),
    Mutant(
        name="a forked process goes on with an iterator of its parent",
        file="steer_service/runtime/event_loop_thread.py",
        old="                if os.getpid() != process:\n                    raise forked_error()\n",
        new="",
        why="the next item never comes",
        killed_by=CHILDREN,
    ),
    Mutant(
        name="a dropped client keeps its thread",
        file="steer_service/runtime/event_loop_thread.py",
        old="    loop.call_soon_threadsafe(begin)\n",
        new="    del begin\n",
        why="a program that makes many clients runs out of threads and open files",
        killed_by=DROPPED,
    ),
    Mutant(
        name="a dropped asynchronous client keeps its session",
        file="steer_client/aio.py",
        old="            session.end_later()\n",
        new="            pass\n",
        why="its connection stays open for ever",
        killed_by=DROPPED,
    ),
)
