"""Adapters by name: what the engine makes of `lora_modules`."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.engine.lora import adapters_from, slots_for


def test_each_adapter_has_its_name_its_path_and_a_number_of_its_own() -> None:
    adapters = adapters_from({"sea": "/a", "land": "/b"}, ["base", "alias"], is_enabled=True)

    assert {name: (each.lora_name, each.lora_path) for name, each in adapters.items()} == {
        "sea": ("sea", "/a"),
        "land": ("land", "/b"),
    }
    assert len({each.lora_int_id for each in adapters.values()}) == 2


@pytest.mark.parametrize("modules", [{"base": "/a"}, {"alias": "/a"}, {"": "/a"}, {"sea": ""}])
def test_a_name_that_is_not_its_own_is_refused(modules: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match=r"lora_modules: .* names no adapter"):
        adapters_from(modules, ["base", "alias"], is_enabled=True)


def test_adapters_need_vllms_own_switch() -> None:
    with pytest.raises(InvalidRequest, match="lora_modules: adapters need enable_lora"):
        adapters_from({"sea": "/a"}, ["base", "alias"], is_enabled=False)
    assert adapters_from({}, ["base", "alias"], is_enabled=False) == {}


def test_on_a_cpu_one_slot_stays_empty() -> None:
    adapters = adapters_from({"sea": "/a", "land": "/b"}, ["base", "alias"], is_enabled=True)

    assert [slots_for(adapters, asked) for asked in (1, 2, 3, 8)] == [3, 3, 3, 8]
    assert slots_for({}, 1) == 1
