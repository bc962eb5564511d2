"""LoRA adapters: named at start, chosen by a request's `model`, as in vLLM's own server.

Relies on (vLLM 0.24 to 0.33): `LoRARequest`, `AsyncLLM.add_lora`, and an adapter's name and path in the keys of
prefix-cache blocks. tests/engine/test_engine_arguments_numbers.py notices a change.
"""

from collections.abc import Mapping, Sequence

from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.engine.steering_config import LORA_MODULES


def adapters_from(modules: Mapping[str, str], names: Sequence[str], *, is_enabled: bool) -> dict[str, LoRARequest]:
    """vLLM's request of each adapter, by name. Raises InvalidRequest for a name that is empty or one of the model's."""
    if modules and not is_enabled:
        raise InvalidRequest("adapters need enable_lora (--enable-lora)", reason="BAD_ARGUMENT", field=LORA_MODULES)
    for name, path in modules.items():
        if not name or not path or name in names:
            raise InvalidRequest(f"{name!r}: {path!r} names no adapter", reason="BAD_ARGUMENT", field=LORA_MODULES)
    return {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(modules.items(), start=1)}


def slots_for(adapters: Mapping[str, LoRARequest], asked: int) -> int:
    """vLLM's `max_loras`; on a CPU, at least one slot more than adapters.

    In a batch with adapters, vLLM's CPU kernels apply the *last* slot (index -1) to requests without one. That slot
    must stay empty.
    """
    return max(asked, len(adapters) + 1) if adapters and current_platform.is_cpu() else asked


async def load_adapters(llm: AsyncLLM, adapters: Mapping[str, LoRARequest]) -> None:
    """Loads all adapters at start. Raises InvalidRequest for an adapter that vLLM cannot load."""
    for name, adapter in adapters.items():
        try:
            await llm.add_lora(adapter)
        except EngineDeadError:
            raise EngineFailed("the engine died while it loaded adapters", reason="ENGINE_DIED") from None
        except Exception as error:  # vLLM's RPC raises plain Exception
            raise InvalidRequest(
                f"vLLM cannot load {name!r}: {error}", reason="BAD_ARGUMENT", field=LORA_MODULES
            ) from error
