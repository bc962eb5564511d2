"""The store of vectors by itself: what is counted, what is forgotten, and what is not."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import Float32Array, vector_digest
from steer_service.core.errors import OverBudget
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.server.vector_store import OVERHEAD_BYTES, VectorStore

WIDTH = 8
ONE = 4 * WIDTH + OVERHEAD_BYTES
"""Bytes that one vector of these tests counts."""


def vector(number: int) -> Float32Array:
    return np.full(WIDTH, 1.0 + number, dtype=np.float32)


def name(number: int) -> bytes:
    return hashlib.sha256(vector(number).tobytes()).digest()


def put(store: VectorStore, *numbers: int, client_id: str = "me") -> None:
    for number in numbers:
        store.put(client_id, name(number), vector(number))


def there(store: VectorStore, client_id: str = "me") -> list[int]:
    """The client's vectors, the most recently used first."""
    return [int(one.vector[0]) - 1 for one in store.listed(client_id)]


def spec_of(*numbers: int) -> SteeringSpec:
    return SteeringSpec({0: LayerSteeringSpec([AddSpec(vector(number)) for number in numbers])})


def test_the_least_recently_used_vector_is_forgotten_first() -> None:
    store = VectorStore(3 * ONE, 3 * ONE)
    put(store, 0, 1, 2)
    assert store.find("me", name(0)) is not None

    put(store, 3)

    assert there(store) == [3, 0, 2]
    assert (len(store), store.total_bytes) == (3, 3 * ONE)


def test_storing_a_vector_again_renews_it_and_counts_nothing() -> None:
    store = VectorStore(2 * ONE, 2 * ONE)
    put(store, 0, 1, 0)
    assert store.total_bytes == 2 * ONE

    put(store, 2)

    assert there(store) == [2, 0]


def test_a_client_over_its_share_loses_its_own_vectors_and_not_others() -> None:
    store = VectorStore(4 * ONE, 2 * ONE)
    put(store, 0, client_id="other")

    put(store, 0, 1, 2, 3)

    assert (there(store), there(store, "other")) == ([3, 2], [0])


def test_all_clients_together_keep_within_the_limit() -> None:
    store = VectorStore(2 * ONE, 2 * ONE, protected_s=0.0)
    put(store, 0, client_id="other")
    put(store, 0, 1)

    assert (there(store), there(store, "other")) == ([1, 0], [])


def test_a_client_evicts_its_own_vectors_and_no_recent_ones_of_others() -> None:
    store = VectorStore(2 * ONE, 2 * ONE)
    put(store, 0, client_id="other")
    put(store, 1)
    put(store, 2)
    assert (there(store), there(store, "other")) == ([2], [0])
    with pytest.raises(OverBudget):
        put(store, 3, client_id="invented")
    assert (there(store), there(store, "other")) == ([2], [0])


def test_a_vector_that_a_request_uses_stays() -> None:
    store = VectorStore(2 * ONE, 2 * ONE)
    put(store, 0, 1)

    with store.using("me", [name(0)], False):
        put(store, 2, 3)
        assert there(store) == [3, 0]
    put(store, 4)

    assert there(store) == [4, 3]


def test_a_vector_stays_until_the_last_request_that_uses_it_has_ended() -> None:
    store = VectorStore(ONE, ONE)
    put(store, 0)
    with store.using("me", [name(0)], False):
        with store.using("me", [name(0)], False):
            pass
        with pytest.raises(OverBudget) as refused:
            put(store, 1)

    assert (refused.value.asked_bytes, refused.value.allowed_bytes) == (ONE, 0)
    assert refused.value.retry_after_s is not None
    assert there(store) == [0]


def test_a_vector_larger_than_the_share_is_refused_for_good() -> None:
    store = VectorStore(2 * ONE, ONE - 1)
    with pytest.raises(OverBudget) as refused:
        put(store, 0)
    assert (refused.value.asked_bytes, refused.value.allowed_bytes) == (ONE, ONE - 1)
    assert refused.value.retry_after_s is None


def test_a_request_reports_whether_all_its_vectors_are_stored() -> None:
    store = VectorStore(2 * ONE, 2 * ONE)
    with store.using("me", [], True) as use:
        assert use.keep(spec_of(0, 1, 0))
        assert not use.keep(None)
    with store.using("me", [], True) as use:
        assert not use.keep(spec_of(2, 3, 4))
    assert VectorStore(0, ONE).client_limit_bytes == 0


def test_a_vector_that_is_used_can_be_deleted_and_stored_again() -> None:
    store = VectorStore(ONE, ONE)
    put(store, 0)
    with store.using("me", [name(0)], False):
        assert store.forget("me", name(0))
        assert not store.forget("me", name(0))
        put(store, 0)
    put(store, 1)
    assert there(store) == [1]


ACTIONS = st.tuples(st.sampled_from(["put", "find", "forget", "use", "end"]), st.sampled_from("ab"), st.integers(0, 5))


@given(st.lists(ACTIONS, max_size=60))
def test_the_bytes_are_those_of_the_stored_vectors_and_within_both_limits(actions: list[tuple[str, str, int]]) -> None:
    store = VectorStore(5 * ONE, 3 * ONE, protected_s=0.0)
    uses = []
    for action, client_id, number in actions:
        match action:
            case "put":
                try:
                    put(store, number, client_id=client_id)
                except OverBudget:
                    assert uses
            case "find":
                found = store.find(client_id, name(number))
                assert found is None or vector_digest(found.vector) == name(number)
            case "forget":
                store.forget(client_id, name(number))
            case "use":
                entered = store.using(client_id, store.named(client_id, [name(number)]), False)
                uses.append((entered, entered.__enter__()))
            case "end":
                if uses:
                    uses.pop(0)[0].__exit__(None, None, None)
        counted = {one: sum(kept.stored_bytes for kept in store.listed(one)) for one in "ab"}
        assert store.total_bytes == sum(counted.values()) == len(store) * ONE <= 5 * ONE
        assert max(counted.values()) <= 3 * ONE
    for entered, _ in uses:
        entered.__exit__(None, None, None)
    put(store, 6, 7, 8, client_id="a")
    assert set(there(store, "a")) == {6, 7, 8}


def test_a_stored_vector_does_not_keep_the_program_it_came_with() -> None:
    store = VectorStore(3 * ONE, 3 * ONE)
    program = np.arange(1, 1 + 100 * WIDTH, dtype=np.float32).reshape(100, WIDTH)
    program.flags.writeable = False
    stored = store.put("me", vector_digest(program[3]), program[3])
    assert stored.vector.base is None
    assert not stored.vector.flags.writeable
    np.testing.assert_array_equal(stored.vector, program[3])
