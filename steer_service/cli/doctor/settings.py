"""Environment variables of this project, and the files that they name: certificates and tokens."""

import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from steer_service.cli.doctor.findings import Finding, fail, ok, warn
from steer_service.core.environment import PREFIX, TEST_PREFIX, VARIABLES, is_service_link, unknown_variable_warnings
from steer_service.core.errors import InvalidRequest
from steer_service.server.certificates import CertificateFiles, Certificates
from steer_service.server.config import ServerConfig
from steer_service.server.tokens import read_clients

SOON = timedelta(days=14)
"""A certificate that expires within this time should be renewed."""


def read_config(environment: Mapping[str, str]) -> tuple[ServerConfig | None, str]:
    """The server's settings, or why they are not valid."""
    try:
        config = ServerConfig.from_environment(environment)
        _ = config.segments
    except InvalidRequest as error:
        return None, str(error)
    return config, ""


def check_settings(environment: Mapping[str, str], problem: str) -> Iterator[Finding]:
    """The variables that begin with STEERLLM_. `problem`: why they are not valid; "" if they are."""
    given = [name for name in environment if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX)]
    unknown = unknown_variable_warnings(environment)
    for name in sorted(given):
        if name in VARIABLES and is_service_link(name, environment[name]):
            yield fail(
                "settings",
                f"{name} is {environment[name]!r}, which Kubernetes sets for a Service of that name; set "
                "enableServiceLinks: false in the pod, or name the Service otherwise",
            )
    if problem:
        yield fail("settings", f"{problem}; docs/configuration.md has the range of every variable")
    for sentence in unknown:
        yield warn("settings", f"{sentence} (it changes nothing: correct or remove it)")
    if not problem and not unknown:
        yield ok("settings", f"{len(given)} variables {PREFIX}* are set" if given else f"no {PREFIX}* variable is set")


def check_certificates(files: CertificateFiles | None) -> Iterator[Finding]:
    """The certificate of the server's address, its key, and the authorities of clients' certificates."""
    if files is None:
        yield ok("tls", "not configured (STEERLLM_TLS_CERT, --tls-cert)")
        return
    try:
        Certificates(files)
    except InvalidRequest as error:
        yield fail("tls", f"{error}; give PEM files that this user can read")
        return
    try:
        expires = expiry_of(files)
    except ssl.SSLCertVerificationError as error:
        yield fail("tls", f"{files.cert}: {error.verify_message}; renew it, a running server reads the new one")
        return
    left = expires - datetime.now(UTC)
    text = f"{files.cert} is valid until {expires:%Y-%m-%d %H:%M} UTC"
    if left < SOON:
        yield warn("tls", f"{text}, {left.days} days from now; renew it, a running server reads the new one")
    else:
        yield ok("tls", text)


def expiry_of(files: CertificateFiles) -> datetime:
    """When the certificate expires; raises SSLCertVerificationError if it is not valid now.

    The standard library reads the dates of a certificate only in a handshake, so one takes place in memory.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.cert, files.key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is what the client trusts
    client.load_verify_locations(cadata=Path(files.cert).read_text(encoding="ascii"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):  # messages of a handshake come in at most three flights
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    found = near.getpeercert()
    assert found, "the client verified a certificate"
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)


def check_tokens(path: str) -> Iterator[Finding]:
    """The file of clients' tokens."""
    if not path:
        yield ok("tokens", "not configured (STEERLLM_TOKEN_FILE, --token-file)")
        return
    try:
        clients = read_clients(path)
    except InvalidRequest as error:
        yield fail("tokens", token_file_problem(path, error))
        return
    now = datetime.now(UTC)
    expired = [client.name for client in clients if client.expires is not None and client.expires <= now]
    if expired:
        yield warn(
            "tokens",
            f"the tokens of {len(expired)} of {len(clients)} clients have expired, such as {expired[0]}; change "
            f"expires in {path}",
        )
    else:
        yield ok("tokens", f"{path} has {len(clients)} clients")


def token_file_problem(path: str, error: InvalidRequest) -> str:
    """Why no server can use a token file, and what writes one."""
    return f"{path}: {error.message}; `steer token NAME --file {path}` writes such a file"
