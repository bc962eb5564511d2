"""The CPU kernel of one step: a plan's and a bank's tables, passed to `ops.cpu_kernel` by address, layer after layer.

T: rows of the step; D: hidden size; H: threads.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_service.ops.cpu_kernel import KernelCall, compiled_kernel, run_on_threads
from steer_service.ops.plan import HostBank, StepPlan

ROWS_PER_THREAD = 8
"""With fewer rows per thread, one thread does all rows: waking the others takes longer."""


class StepKernel:
    """The kernel for one step: a plan, a bank and the model's dtype, called layer after layer.

    Rows are shared out over the threads that torch uses in the thread that constructs it.
    """

    def __init__(self, plan: StepPlan, bank: HostBank, dtype: torch.dtype) -> None:
        self._held = plan, bank  # the kernel knows their arrays by address
        self._run = compiled_kernel(dtype)
        _, slots, operations = bank.op_rows_LSK.shape
        bank_rows, coefficients = bank.coefficients_WC.shape
        # All threads or one: a pool that runs fewer ends the others, and new threads would not be bound to cores.
        threads = torch.get_num_threads()
        self._threads = threads if len(plan.rows_N) >= threads * ROWS_PER_THREAD else 1
        # The kernel cannot report a failed allocation.
        self._scratch_HD, self._rounded_HD = np.empty((2, self._threads, bank.directions_WD.shape[1]), np.float32)
        self._call = KernelCall(
            rows_N=_address(plan.rows_N, np.int32),
            requests_N=_address(plan.requests_N, np.int32),
            slots_N=_address(plan.slots_N, np.int32),
            scopes_N=0 if plan.scopes_N is None else _address(plan.scopes_N, np.uint64),
            capture_rows_N=_address(plan.capture_rows_N, np.int32),
            bad_N=_address(plan.bad_N, np.uint8),
            changes_NLC=0 if plan.changes_NLC is None else _address(plan.changes_NLC, np.float32),
            rows=len(plan.rows_N),
            slots_R=_address(plan.slots_R, np.int32),
            captures_float32_R=_address(plan.captures_float32_R, np.bool_),
            reports_change_R=_address(plan.reports_change_R, np.bool_),
            before_LR=_address(plan.before_LR, np.int64),
            after_LR=_address(plan.after_LR, np.int64),
            requests=len(plan.slots_R),
            layers=len(plan.before_LR),
            op_rows_LSK=_address(bank.op_rows_LSK, np.int32),
            op_counts_LS=_address(bank.op_counts_LS, np.int32),
            slots=slots,
            operations=operations,
            directions_WD=_address(bank.directions_WD, np.float32),
            coefficients_WC=_address(bank.coefficients_WC, np.float32),
            bank_rows=bank_rows,
            coefficients=coefficients,
            width=bank.directions_WD.shape[1],
            check_layer=plan.check_layer,
            scratch_HD=_address(self._scratch_HD, np.float32),
            rounded_HD=_address(self._rounded_HD, np.float32),  # room for an element of any dtype
        )
        self._address = ctypes.addressof(self._call)

    def run(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Steers, captures and checks the plan's rows of one layer in place; marks bad ones in the plan's `bad_N`.

        The residual stream is `hidden_TD`, or its sum with `residual_TD`: contiguous, of the kernel's dtype and hidden
        size, with all rows of the plan. This is not checked.
        """
        call = self._call
        call.layer = layer
        call.hidden_TD = hidden_TD.data_ptr()
        call.residual_TD = 0 if residual_TD is None else residual_TD.data_ptr()
        call.stream_rows = len(hidden_TD)
        run_on_threads(self._run, self._address, self._threads)


def _address(table: npt.NDArray[Any], dtype: npt.DTypeLike) -> int:
    """The address of a table that the kernel reads as C-contiguous and of this dtype."""
    assert table.dtype == dtype
    assert table.flags.c_contiguous
    return int(table.__array_interface__["data"][0])
