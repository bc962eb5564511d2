"""Converts vLLM's errors to this project's."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError
from steer_service.engine.vllm_patches.compat import OVERLOADED, REFUSED
from steer_service.shm.pool import RETRY_AFTER_S


@contextmanager
def vllm_errors() -> Iterator[None]:
    """Within the block, raises errors of vLLM as a SteerError."""
    try:
        yield
    except SteerError:
        raise
    except EngineDeadError as error:
        raise EngineFailed("the engine died; requests in flight are lost", reason="ENGINE_DIED") from error
    except REFUSED as error:
        raise InvalidRequest(str(error), reason="REFUSED_BY_ENGINE") from error
    except OVERLOADED as error:
        raise Overloaded(str(error), retry_after_s=RETRY_AFTER_S) from error
    except Exception as error:  # vLLM's RPC raises plain Exception; texts may hold a prompt
        raise EngineFailed("the engine failed on this request") from error
