"""An example of a client in the server's pod: it reads the captures of its requests from shared memory."""

import os
import threading
from pathlib import Path

from steer_client import CaptureSpec, SteerClient, SteerError, tls_credentials

EVERY_S = 60.0


def main() -> None:
    """Captures the hidden states of one prompt every minute, for ever."""
    address = f"{os.environ['POD_IP']}:50051"
    with connected(address, credentials=Path("/etc/steerllm/client"), captures=Path("/captures")) as model:
        while True:
            try:
                print(shape_of_a_capture(model), flush=True)
            except SteerError as error:  # the server is still loading its model, for example
                print(error, flush=True)
            threading.Event().wait(EVERY_S)


def connected(address: str, *, credentials: Path, captures: Path) -> SteerClient:
    """A client of the server at `address`; `credentials` has ca.crt and token, `captures` the shared memory."""
    return SteerClient(
        address,
        credentials=tls_credentials(ca=credentials / "ca.crt"),
        token=(credentials / "token").read_text().strip(),
        shm_dir=str(captures),
        # The certificate has the service's name, and this client calls an address of its own pod.
        channel_options=(("grpc.ssl_target_name_override", "steerllm"),),
    )


def shape_of_a_capture(model: SteerClient) -> tuple[int, ...]:
    """The shape of the last layer's rows, which are mapped and not copied."""
    last = model.layer_count - 1
    capture = CaptureSpec(layers=[last], delivery="shared_memory_required")
    _, handles = model.generate(["The sea is"], max_tokens=8, capture=capture)
    with handles[0] as handle:
        return tuple(handle.fetch()[last][0]["hidden"].shape)


if __name__ == "__main__":
    main()
