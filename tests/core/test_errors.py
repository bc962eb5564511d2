"""Errors: what they are to a caller, and how a field finds its full path."""

import pickle

import pytest

from steer_service.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    OverBudget,
    Overloaded,
    SteerError,
    Unsupported,
    within,
    within_each,
)

KINDS = [InvalidRequest, NotFound, Unsupported, Overloaded, OverBudget, DeadlineExceeded, EngineFailed]


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidRequest, ValueError),
        (NotFound, LookupError),
        (Unsupported, NotImplementedError),
        (DeadlineExceeded, TimeoutError),
        (EngineFailed, RuntimeError),
    ],
)
def test_each_kind_is_also_what_python_would_raise(kind: type[SteerError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_the_field_and_the_message(kind: type[SteerError]) -> None:
    error = kind("is wrong", reason="WRONG", field="a.b", retry_after_s=2.5)

    assert str(error) == "a.b: is wrong"
    assert (error.message, error.reason, error.field, error.retry_after_s) == ("is wrong", "WRONG", "a.b", 2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_without_a_field_is_its_message_and_has_a_reason(kind: type[SteerError]) -> None:
    error = kind("is wrong")

    assert str(error) == "is wrong"
    assert error.reason == kind.default_reason
    assert error.reason.isupper()


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind: type[SteerError]) -> None:
    error = pickle.loads(pickle.dumps(kind("is wrong", reason="WRONG", field="a", retry_after_s=1.0)))

    assert (type(error), str(error), error.reason, error.retry_after_s) == (kind, "a: is wrong", "WRONG", 1.0)


def test_an_error_over_budget_says_the_bytes_even_after_pickling() -> None:
    error = pickle.loads(pickle.dumps(OverBudget("too much", asked_bytes=9, allowed_bytes=5)))

    assert isinstance(error, Overloaded)
    assert (error.asked_bytes, error.allowed_bytes) == (9, 5)


def test_paths_are_written_from_the_outside_in() -> None:
    with pytest.raises(InvalidRequest) as raised:
        with within("steering"), within("layers[3]"), within("operations[0]"):
            raise InvalidRequest("is wrong", field="vector")

    assert raised.value.field == "steering.layers[3].operations[0].vector"


def check_layers(layers: dict[int, str]) -> None:
    with within_each("layers", layers.items()) as pairs:
        for _, spec in pairs:
            if spec == "bad":
                raise InvalidRequest("is wrong", field="vector")


def test_of_many_items_the_one_that_was_taken_last_is_named() -> None:
    check_layers({3: "good"})
    check_layers({})
    with pytest.raises(InvalidRequest) as raised:
        check_layers({3: "good", 7: "bad", 9: "never seen"})

    assert raised.value.field == "layers[7].vector"


def test_an_error_that_names_no_field_takes_the_path_around_it() -> None:
    with pytest.raises(InvalidRequest) as raised:
        with within("prompt"):
            raise InvalidRequest("is wrong")

    assert raised.value.field == "prompt"


def test_other_exceptions_pass_a_path_untouched() -> None:
    with pytest.raises(KeyError, match="other"):
        with within("prompt"):
            raise KeyError("other")
