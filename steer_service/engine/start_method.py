"""How vLLM starts its processes. Importing this imports no vLLM."""

from collections.abc import MutableMapping

from steer_service.core.errors import Unsupported

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's way to start processes, by default a fork on a GPU: it would have this process's gRPC threads and sockets."""


def check_start_method(environment: MutableMapping[str, str]) -> None:
    """Makes vLLM start new processes, without forks; raises Unsupported if the variable says otherwise."""
    if environment.setdefault(START_METHOD, "spawn") != "spawn":
        raise Unsupported(
            f"{environment[START_METHOD]!r} is refused: vLLM's processes must not be forks of one that uses gRPC",
            reason="ARGUMENT_REFUSED",
            field=START_METHOD,
        )
