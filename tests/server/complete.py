"""What a fake server needs so that its metrics have every series: a backend with limits and a proof, and TLS."""

from datetime import datetime
from pathlib import Path

import trustme

from steer_service.core.usage import BackendUsage, BankUsage, MemoryUsage
from steer_service.testing.fake_backend import FakeBackend
from tests.wire.test_info import PROOF

USAGE = BackendUsage(
    bank=BankUsage(
        slots=128,
        slots_used=5,
        slots_idle=20,
        operations=4000,
        operations_used=300,
        operations_idle=700,
        waiting_requests=2,
    ),
    memory={
        "captures": MemoryUsage(used_bytes=1000, limit_bytes=64000),
        "marks": MemoryUsage(used_bytes=16, limit_bytes=4096),
    },
    segments=3,
)


class Complete(FakeBackend):
    """A backend that has limits, and has proven something."""

    start_proof = PROOF

    def __init__(self) -> None:
        super().__init__(usage=USAGE)


def certificate_in(folder: Path, not_after: datetime | None = None) -> dict[str, str]:
    """Settings of a server with a certificate, which is written to `folder`."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1", not_after=not_after)
    cert, key, client_ca = folder / "server.crt", folder / "server.key", folder / "clients.ca"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    client_ca.write_bytes(authority.cert_pem.bytes())
    return {"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(client_ca)}
