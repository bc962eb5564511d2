"""Programs to load into a bank, and checks of what a bank holds."""

import numpy as np

from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.program import Program, compile_program

LAYERS = 3
WIDTH = 4
SIZE = BankSize(slots=3, rows=6, operations_per_layer=6)


def program(number: int, operations: int = 1, layer: int = 0) -> Program:
    """A program that no other number gives, of so many operations at one layer."""
    adds = [AddSpec(np.full(WIDTH, 1.0 + number), 1.0 + index) for index in range(operations)]
    return compile_program(SteeringSpec(layers={layer: LayerSteeringSpec(operations=adds)}))


PROGRAMS = [program(number, operations=1 + number % 4, layer=number % LAYERS) for number in range(6)]


def rows_in(bank: ProgramBank, layer: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions and coefficients that the kernel would run."""
    rows = bank.op_rows_LSK[layer, slot, : bank.op_counts_LS[layer, slot]]
    return bank.directions_WD[rows], bank.coefficients_WC[rows]


def assert_holds(bank: ProgramBank, slot: int, wanted: Program) -> None:
    """The slot holds exactly this program, at every layer."""
    assert bank.holds(slot, wanted.digest)
    for layer in range(LAYERS):
        directions, coefficients = rows_in(bank, layer, slot)
        part = wanted.layers.get(layer)
        assert directions.tolist() == ([] if part is None else part.directions.tolist())
        assert coefficients.tolist() == ([] if part is None else part.coefficients.tolist())


def assert_rows_are_not_shared(bank: ProgramBank) -> None:
    used = [
        row
        for layer in range(bank.op_counts_LS.shape[0])
        for slot in range(bank.op_counts_LS.shape[1])
        for row in bank.op_rows_LSK[layer, slot, : bank.op_counts_LS[layer, slot]]
    ]
    assert len(used) == len(set(used))
