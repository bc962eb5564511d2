"""The programs of one worker, in the tables that the kernel reads.

L: layers held by the worker; S: slots; K: operations of one layer; W: rows of the bank, one operation each; D: hidden
size.
"""

from collections.abc import Sequence

import numpy as np

from steer_service.engine.slots import BankSize, ProgramLoad
from steer_service.ops.program import COEFFICIENTS, program_from_bytes


class FreeRows:
    """The free rows of the bank, in one share per layer.

    The rows of one layer are therefore adjacent in memory. Reading them is twice as fast as from scattered places.
    """

    def __init__(self, count: int, layers: Sequence[int]) -> None:
        self._share = -(-count // max(1, len(layers)))
        self._shares = {layer: index for index, layer in enumerate(layers)}
        starts = range(0, count, self._share)
        self._free = [list(range(start, min(start + self._share, count)))[::-1] for start in starts]

    def take(self, layer: int, count: int) -> list[int]:
        """Takes `count` rows, from the layer's share as long as it has any; `count` rows must be free."""
        rows: list[int] = []
        mine = self._shares[layer]
        while len(rows) < count:
            free = self._free[mine] if mine < len(self._free) and self._free[mine] else max(self._free, key=len)
            rows.append(free.pop())
        return rows

    def give_back(self, rows: Sequence[int]) -> None:
        """Makes the rows free again."""
        for row in reversed(rows):
            self._free[row // self._share].append(row)


class ProgramBank:
    """The tables of one worker: for each layer and slot, the rows of the bank to run, in order."""

    def __init__(self, size: BankSize, layers: Sequence[int], layer_count: int, hidden_size: int) -> None:
        self.op_rows_LSK = np.zeros((layer_count, size.slots, size.operations_per_layer), np.int32)
        """Rows of `directions` and `coefficients`, in order."""
        self.op_counts_LS = np.zeros((layer_count, size.slots), np.int32)
        """The number of operations per layer and slot: later elements of `op_rows_LSK` are unused."""
        self.directions_WD = np.zeros((size.rows, hidden_size), np.float32)
        """One direction per operation."""
        self.coefficients_WC = np.zeros((size.rows, COEFFICIENTS), np.float32)
        """Coefficients per operation, see `ops.program`."""
        self._layers = frozenset(layers)
        self._hidden_size = hidden_size
        self._digests = [""] * size.slots
        self._free_rows = FreeRows(size.rows, layers)

    def load(self, load: ProgramLoad) -> None:
        """Puts one program in its slot, in place of the old one. Only layers of this worker take rows."""
        self._clear(load.slot)
        if not load.digest:
            return
        program = program_from_bytes(load.data, self._hidden_size)
        for layer, part in program.layers.items():
            if layer in self._layers:
                rows = self._free_rows.take(layer, len(part.coefficients))
                self.directions_WD[rows] = part.directions
                self.coefficients_WC[rows] = part.coefficients
                self.op_rows_LSK[layer, load.slot, : len(rows)] = rows
                self.op_counts_LS[layer, load.slot] = len(rows)
        self._digests[load.slot] = load.digest

    def holds(self, slot: int, digest: str) -> bool:
        """True if `slot` holds the program with this digest."""
        return 0 <= slot < len(self._digests) and self._digests[slot] == digest

    def digest_of(self, slot: int) -> str:
        """Digest of the program in `slot`; "" if it is empty."""
        return self._digests[slot]

    def _clear(self, slot: int) -> None:
        for layer in self._layers:
            count = self.op_counts_LS[layer, slot]
            self._free_rows.give_back(self.op_rows_LSK[layer, slot, :count].tolist())
            self.op_counts_LS[layer, slot] = 0
        self._digests[slot] = ""
