"""`steer selftest`: proves that steering and capture are right on this device, without a model."""

import argparse
import sys
import time

from steer_service.cli.exit_status import FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `steer selftest`."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="torch's name of the device, such as cpu or cuda:1 (default: cuda, or cpu)"
    )


def run(namespace: argparse.Namespace) -> int:
    """Prints what was proven, a line for each dtype and hidden size; returns 1 at the first fault."""
    import torch

    from steer_service.core.errors import SteerError
    from steer_service.engine.worker.device_proof import prove_device
    from steer_service.engine.worker.devices import check_device
    from steer_service.engine.worker.kernel_proof import KernelFault

    name = namespace.device or ("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    try:
        device = torch.device(name)
        check_device(device.type)
        if device.type == "cuda" and not torch.cuda.is_available():
            print("steer: torch finds no GPU; `nvidia-smi` shows what the driver finds", file=sys.stderr)
            return FAILED
        with torch.inference_mode():
            for proof in prove_device(device):
                kernel = (
                    f"{proof.kernel_rows} rows of the kernel, largest error {proof.kernel_error:.2f} of the tolerance"
                )
                passes = f"order and emptying of passes, {' and '.join(proof.ways)}"
                print(f"steer: {proof.dtype}, width {proof.width}: {kernel}; {passes}", flush=True)
    except SteerError as error:
        print(f"steer: {error}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:  # torch's, for a name that it does not know, or a device that is not there
        print(f"steer: the device {name!r} cannot be used: {error}", file=sys.stderr)
        return FAILED
    except KernelFault as fault:
        print(
            f"steer: steering is not right on this device: {fault}. Try another version of Triton or of the driver, "
            "and report it with this output",
            file=sys.stderr,
        )
        return FAILED
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    print(f"steer: steering and capture are right on {what}, proven in {time.monotonic() - began:.1f} s")
    return 0
