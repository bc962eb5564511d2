"""`steer doctor [MODEL]`: what keeps `steer serve` from its start here, and what to do, one line for each check."""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial

from steer_service.cli.doctor.child import ended_with_this_process
from steer_service.cli.doctor.device import Gpu, check_driver, check_torch, look_at_driver, look_at_torch
from steer_service.cli.doctor.findings import Check, Finding, Status, findings_of, warn
from steer_service.cli.doctor.folders import Use, check_folders, folders_of
from steer_service.cli.doctor.host_memory import check_memory
from steer_service.cli.doctor.open_files import check_open_files
from steer_service.cli.doctor.packages import (
    check_breakable,
    check_python,
    check_serve_imports,
    check_vllm,
    installed_vllm,
)
from steer_service.cli.doctor.ports import check_ports
from steer_service.cli.doctor.processor import check_processor
from steer_service.cli.doctor.served_model import ServedModel, check_model, find_model
from steer_service.cli.doctor.settings import check_certificates, check_settings, check_tokens, read_config
from steer_service.cli.doctor.shared_memory import check_shared_memory
from steer_service.cli.exit_status import FAILED
from steer_service.server.config import ServerConfig

DESCRIPTION = """\
Checks whether `steer serve MODEL` can start here, and prints one line for each check: ok, or warn or fail with what to
do. It reads the environment variables that `steer serve` reads, loads no model, and changes nothing. The exit status
is 1 if a check fails, and else 0.
"""

THREADS = 4
"""Checks at once: some wait for imports in processes of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `steer doctor`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or name (default: the bundled model)")
    parser.add_argument("--json", action="store_true", help="print a list of objects with check, status and text")


def run(namespace: argparse.Namespace) -> int:
    """Prints what the checks find and returns the exit status."""
    found: list[Finding] = []
    with ended_with_this_process():
        for finding in diagnose(namespace.model, os.environ):
            found.append(finding)
            if not namespace.json:
                print(f"{finding.status:<4}  {finding.check}: {finding.text}", flush=True)
    if namespace.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    return FAILED if any(finding.status is Status.FAIL for finding in found) else 0


def diagnose(model: str | None, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What all checks find, in their order; several run at a time."""
    checks = _checks(model, environment)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="steer-doctor") as threads:
        running = [threads.submit(findings_of, name, check) for name, check in checks.items()]
        for one in running:
            yield from one.result()


def _checks(name: str | None, environment: Mapping[str, str]) -> dict[str, Check]:
    """Name -> check; what several of them look at is looked at once, within the first."""
    config, problem = read_config(environment)
    vllm, driver = cache(installed_vllm), cache(look_at_driver)
    model = cache(lambda: find_model(name, environment))
    return {
        "python": check_python,
        "vllm": lambda: check_vllm(vllm()),
        "processor": lambda: check_processor(vllm()),
        "gpu": lambda: check_driver(driver()),
        "torch": lambda: check_torch(look_at_torch(), driver(), vllm()),
        "torch extras": check_breakable,
        "engine": lambda: check_serve_imports(vllm()),
        "model": lambda: check_model(model()),
        "memory": lambda: check_memory(model().need, gpu_free_bytes=_largest_gpu(driver().gpus)),
        "captures": _with(
            config, "captures", lambda valid: check_shared_memory(valid.segments, workers=0 if driver().gpus else 1)
        ),
        "folders": lambda: check_folders(folders_of(environment, _use_of(model(), on_gpu=bool(driver().gpus)))),
        "open files": lambda: check_open_files((config or ServerConfig()).max_concurrent_requests),
        "settings": partial(check_settings, environment, problem),
        "address": _with(config, "address", check_ports),
        "tls": _with(config, "tls", lambda valid: check_certificates(valid.certificates)),
        "tokens": _with(config, "tokens", lambda valid: check_tokens(valid.token_file)),
    }


def _with(config: ServerConfig | None, check: str, run_check: Callable[[ServerConfig], Iterable[Finding]]) -> Check:
    """`run_check` of valid settings; a warning that nothing was checked, without them."""
    if config is None:
        return lambda: [warn(check, "not checked, since the settings are not valid")]
    return lambda: run_check(config)


def _largest_gpu(gpus: tuple[Gpu, ...]) -> int:
    return max((gpu.free_bytes for gpu in gpus), default=0)


def _use_of(model: ServedModel, *, on_gpu: bool) -> Use:
    """What a server of this model does."""
    return Use(
        converts=model.needs_conversion,
        downloads=model.needs_download,
        on_gpu=on_gpu,
    )
