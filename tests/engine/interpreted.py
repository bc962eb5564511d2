"""A worker on the CPU whose hooks are those of a GPU: Triton interprets the kernel (TRITON_INTERPRET=1)."""

from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.engine.worker.worker import SteeringWorker

INTERPRETED_WORKER = "tests.engine.interpreted.InterpretedWorker"


class InterpretedWorker(SteeringWorker):
    """The worker, with tables and staging of its device, which is a CPU."""

    make_hooks = staticmethod(CudaHooks)
