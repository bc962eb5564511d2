"""What `steer serve` refuses before vLLM is imported, which takes ten seconds and more.

The command line is read twice: here by a parser that knows this project's flags alone, and then by one that has vLLM's
too. No flag of vLLM may be the beginning of one of ours, which tests/engine/test_serve_help.py checks.
"""

import argparse
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from steer_service.cli.doctor import host_memory
from steer_service.cli.doctor.findings import Status
from steer_service.cli.doctor.host_memory import Files
from steer_service.cli.doctor.packages import installed_vllm, is_for_cpu
from steer_service.cli.doctor.served_model import find_model, is_path
from steer_service.cli.doctor.settings import token_file_problem
from steer_service.cli.server_flags import source_of
from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound
from steer_service.engine.start_method import check_start_method
from steer_service.engine.steering_config import LORA_MODULES, OURS, SteeringConfig, flag_of, parse_lora_modules
from steer_service.hf.bundled_model import bundled_model_folder
from steer_service.server.bind import address_of, check_free, check_not_exposed
from steer_service.server.certificates import Certificates
from steer_service.server.config import ServerConfig
from steer_service.server.tokens import TokenFile


def check_settings(config: ServerConfig, namespace: argparse.Namespace) -> None:
    """Raises InvalidRequest or Unsupported, whose field is the flag or the variable, where no server may start."""
    with _named_by_flags(namespace):
        if config.certificates is None and not config.insecure:
            check_not_exposed(config.address)
        SteeringConfig(**{field.name: getattr(namespace, OURS + field.name) for field in fields(SteeringConfig)})
        parse_lora_modules(namespace.lora_modules)
        check_start_method(os.environ)
        if config.token_file:
            _check_token_file(config.token_file)
        if config.certificates is not None:
            Certificates(config.certificates)


def check_machine(config: ServerConfig, namespace: argparse.Namespace) -> None:
    """Checks that the addresses are free and that captures have a directory.

    Raises EngineFailed for an address, InvalidRequest or Overloaded for the directory.
    """
    _check_free(config.address, "--port (or --uds)")
    if config.health_address:
        _check_free(config.health_address, "--health-address")
    if config.metrics_port:
        _check_free(address_of(config.metrics_host, config.metrics_port), "--metrics-port")
    with _named_by_flags(namespace):
        config.segments.check()


def check_model(model: str | None) -> None:
    """Raises NotFound if the folder of the model does not exist. None: the bundled model."""
    if model is None:
        bundled_model_folder()
    elif is_path(model) and not Path(model).exists():
        raise NotFound(
            f"there is no folder {model}: give the folder of a model, or a name such as org/model", reason="NO_MODEL"
        )


def check_memory(model: str | None, cache_bytes: int | None, files: Files | None = None) -> str:
    """A warning that the model may not fit into the memory of this machine or container, on a CPU; "" if it does.

    `cache_bytes`: memory for keys and values; None: not known, or the default of the bundled model. Raises EngineFailed
    if there is less memory than its processes and weights need: the system would kill one of them as it starts.
    """
    need = find_model(model, os.environ).need
    if need is None or not is_for_cpu(installed_vllm()):
        return ""
    need = need if cache_bytes is None else replace(need, cache_bytes=cache_bytes)
    for found in host_memory.check_memory(need, files=files):
        if found.status is Status.FAIL:
            raise EngineFailed(found.text, reason="HOST_MEMORY")
        if found.status is Status.WARN:
            return f"{found.text}. The system may kill a process of vLLM"
    return ""


def is_model_known(words: Sequence[str], others: Sequence[str]) -> bool:
    """True if it is clear without vLLM's flags which word of the command line is the model.

    `others`: what of it is vLLM's, so that any word may be the value of a flag.
    """
    return not others or not words[0].startswith("-")


def cache_bytes_in(text: str | None) -> int | None:
    """The bytes of --kv-cache-memory-bytes, as far as they are known without vLLM: 0 if not; None without the flag."""
    return None if text is None else int(text) if text.isdecimal() else 0


def _check_free(address: str, flag: str) -> None:
    try:
        check_free(address)
    except EngineFailed as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            error.message += f"; another `steer serve` may run there: choose another address with {flag}"
        raise


def _check_token_file(path: str) -> None:
    try:
        TokenFile(path)
    except InvalidRequest as error:
        raise InvalidRequest(token_file_problem(path, error), reason=error.reason, field=error.field) from error


@contextmanager
def _named_by_flags(namespace: argparse.Namespace) -> Iterator[None]:
    """The field of an InvalidRequest within the block becomes the flag or the variable that it came from."""
    try:
        yield
    except InvalidRequest as error:
        if error.field.startswith(OURS):
            error.field = flag_of(error.field.removeprefix(OURS))
        elif error.field == LORA_MODULES:
            error.field = "--lora-modules"
        elif error.field:
            error.field = source_of(error.field, namespace)
        raise
