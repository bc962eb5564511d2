"""A client on a system that is not Linux. `python -m tests.client.elsewhere SYSTEM ADDRESS` uses it over TCP.

It hides what the system lacks before anything is imported, and fails with a traceback.
"""

import mmap
import os
import sys

LINUX_ALONE = (
    *((os, name) for name in ("memfd_create", "sched_getaffinity", "pidfd_open", "posix_fallocate", "eventfd")),
    *((mmap, name) for name in ("MAP_POPULATE", "MAP_NORESERVE", "MADV_HUGEPAGE", "MADV_DONTFORK")),
)
POSIX_ALONE = (
    *(
        (os, name)
        for name in ("fork", "register_at_fork", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "geteuid", "statvfs")
    ),
    *((mmap, name) for name in ("MAP_PRIVATE", "MAP_SHARED", "MAP_ANONYMOUS", "PROT_READ", "PROT_WRITE")),
)
HIDDEN = {"darwin": LINUX_ALONE, "win32": LINUX_ALONE + POSIX_ALONE}
MODULES = {"darwin": (), "win32": ("fcntl", "grp", "pwd", "resource", "termios")}


def generate(address: str, shm_dir: str) -> None:
    from steer_client import CaptureSpec, SteerClient, Unsupported

    with SteerClient(address, shm_dir=shm_dir) as client:
        assert client.hidden_size == 8
        assert len(client.generate(["a b"], max_tokens=3).texts) == 1
        preferred = CaptureSpec(layers=(1,), delivery="shared_memory_preferred")
        [generation], handles = client.generate("a b", max_tokens=3, capture=preferred, raw_output=True)
        print(generation.capture_delivery, generation.shared_memory_fallback)
        assert handles is not None
        with handles[0] as handle:
            assert handle.fetch()[1][0]["hidden"].shape == (4, 8)
        try:
            client.generate("a b", max_tokens=3, capture=CaptureSpec(layers=(1,), delivery="shared_memory_required"))
        except Unsupported as error:
            print(error.reason, error)


if __name__ == "__main__":
    import asyncio  # the standard library itself needs what is hidden, and is imported first  # noqa: F401
    import ctypes  # noqa: F401
    import logging.handlers  # noqa: F401
    import multiprocessing.connection  # noqa: F401
    import selectors  # noqa: F401
    import subprocess  # noqa: F401
    import tempfile  # noqa: F401
    import uuid  # noqa: F401

    import grpc  # noqa: F401
    import ml_dtypes  # noqa: F401
    import numpy as np  # noqa: F401

    system, address = sys.argv[1:]
    for module, name in HIDDEN[system]:
        if hasattr(module, name):
            delattr(module, name)
    for name in MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    sys.platform = system
    generate(address, "/dev/no-shm")
