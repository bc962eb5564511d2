"""The tables of a worker: slots hold what was loaded last, rows are not shared and not lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.engine.slots import BankSize, ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.ops.program import Program, compile_program, program_to_bytes
from tests.engine.bank_contents import (
    LAYERS,
    PROGRAMS,
    SIZE,
    WIDTH,
    assert_holds,
    assert_rows_are_not_shared,
    program,
    rows_in,
)


def loaded(bank: ProgramBank, slot: int, one: Program) -> None:
    bank.load(ProgramLoad(slot=slot, digest=one.digest, data=program_to_bytes(one)))


def all_layers(number: int, operations: int) -> Program:
    adds = [AddSpec(np.full(WIDTH, 1.0 + number), 1.0 + index) for index in range(operations)]
    return compile_program(SteeringSpec(layers={layer: LayerSteeringSpec(operations=adds) for layer in range(LAYERS)}))


@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 5))), max_size=30))
def test_slots_hold_what_was_loaded_last_and_no_row_is_lost(changes: list[tuple[int, int | None]]) -> None:
    bank = ProgramBank(BankSize(slots=3, rows=12, operations_per_layer=4), range(LAYERS), LAYERS, WIDTH)
    holding: dict[int, Program] = {}

    for slot, number in changes:
        if number is None:
            bank.load(ProgramLoad(slot=slot, digest="", data=b""))
            holding.pop(slot, None)
        else:
            loaded(bank, slot, PROGRAMS[number])
            holding[slot] = PROGRAMS[number]
        for held, one in holding.items():
            assert_holds(bank, held, one)
        assert_rows_are_not_shared(bank)

    for slot in range(3):
        loaded(bank, slot, program(slot, operations=4))  # all rows are there for new programs


def test_only_layers_that_this_worker_holds_take_rows() -> None:
    bank = ProgramBank(
        BankSize(slots=2, rows=4, operations_per_layer=2), layers=[1], layer_count=LAYERS, hidden_size=WIDTH
    )

    loaded(bank, 0, all_layers(0, operations=2))
    loaded(bank, 1, all_layers(1, operations=2))

    assert bank.op_counts_LS.tolist() == [[0, 0], [2, 2], [0, 0]]
    assert bank.holds(0, all_layers(0, operations=2).digest)
    assert rows_in(bank, 1, 1)[0].tolist() == all_layers(1, operations=2).layers[1].directions.tolist()


def test_rows_that_a_layer_reads_are_contiguous() -> None:
    size = BankSize(slots=3, rows=6 * LAYERS, operations_per_layer=2)
    bank = ProgramBank(size, range(LAYERS), LAYERS, WIDTH)

    for slot in (0, 1, 2, 1):  # the third takes the place of the second, which gives its rows back
        loaded(bank, slot, all_layers(slot, operations=2))

    for layer in range(LAYERS):
        assert bank.op_rows_LSK[layer].ravel().tolist() == list(range(6 * layer, 6 * layer + 6))


def test_a_layer_takes_rows_of_others_when_its_own_are_used_up() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)  # two rows for each of three layers

    loaded(bank, 0, program(0, layer=1, operations=4))

    assert_holds(bank, 0, program(0, layer=1, operations=4))


def test_a_program_with_nothing_for_this_worker_is_held_all_the_same() -> None:
    bank = ProgramBank(SIZE, layers=[2], layer_count=LAYERS, hidden_size=WIDTH)

    loaded(bank, 1, program(0, layer=0))

    assert bank.holds(1, program(0, layer=0).digest)
    assert not bank.op_counts_LS.any()


def test_a_slot_holds_one_digest_and_no_other() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)
    loaded(bank, 1, program(0))

    assert bank.holds(1, program(0).digest)
    assert not bank.holds(0, program(0).digest)
    assert not bank.holds(1, program(1).digest)
    assert not bank.holds(-2, program(0).digest)
    assert not bank.holds(SIZE.slots, program(0).digest)


def test_operations_keep_their_order_in_the_tables() -> None:
    bank = ProgramBank(SIZE, range(LAYERS), LAYERS, WIDTH)
    loaded(bank, 0, program(0, operations=3))
    loaded(bank, 1, program(1, operations=3))
    bank.load(ProgramLoad(slot=0, digest="", data=b""))

    loaded(bank, 0, program(2, operations=3))

    assert rows_in(bank, 0, 0)[0][:, 0].tolist() == [3.0, 6.0, 9.0]
