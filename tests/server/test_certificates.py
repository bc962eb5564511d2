"""TLS over real connections: whose certificate is accepted, whose is not, and how certificates change under load."""

import asyncio
import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from steer_client import AsyncSteerClient, EngineFailed, InvalidRequest, tls_credentials
from steer_service.server.app import SteerServer
from steer_service.server.certificates import CertificateFiles, Certificates
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.server.served import BOUND_S, Serve, bounded
from tests.server.test_tokens import entry

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Pem:
    """A certificate in files."""

    cert: Path
    key: Path

    @classmethod
    def write(cls, folder: Path, name: str, issued: trustme.LeafCert) -> "Pem":
        pem = cls(folder / f"{name}.crt", folder / f"{name}.key")
        pem.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        pem.key.write_bytes(issued.private_key_pem.bytes())
        return pem


@dataclass
class Authority:
    """An authority, with its own certificate in a file."""

    made: trustme.CA
    folder: Path
    name: str

    @property
    def cert(self) -> Path:
        path = self.folder / f"{self.name}.ca"
        if not path.exists():
            self.made.cert_pem.write_to_path(path)
        return path

    def issue_spiffe(self, spiffe_id: str, other: str) -> Pem:
        """Of a workload in a mesh, whose name is a URI, which trustme does not make."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self.made.cert_pem.bytes())
        names = [x509.DNSName(other), x509.UniformResourceIdentifier(spiffe_id)]
        made = (
            x509.CertificateBuilder(not_valid_before=NOW - DAY, not_valid_after=NOW + DAY)
            .subject_name(x509.Name([]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(serialization.load_pem_private_key(self.made.private_key_pem.bytes(), None), hashes.SHA256())
        )
        pem = Pem(self.folder / "spiffe.crt", self.folder / "spiffe.key")
        pem.cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        pem.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pem

    def issue(self, file: str, *names: str, **options: Any) -> Pem:
        return Pem.write(self.folder, f"{self.name}-{file}", self.made.issue_cert(*names, **options))


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(trustme.CA(), tmp_path, "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(trustme.CA(), tmp_path, "theirs")


@pytest.fixture
def settings(ours: Authority) -> dict[str, str]:
    server = ours.issue("server", "localhost", "127.0.0.1")
    return {"tls_cert": str(server.cert), "tls_key": str(server.key)}


def local(server: SteerServer) -> str:
    return server.address.replace("127.0.0.1", "localhost")


async def reaches(address: str, **options: Any) -> bool:
    """Whether a client learns the model's facts; a connection that fails is an error with a type, and not a hang."""
    async with AsyncSteerClient(address, unary_timeout_s=BOUND_S / 2, **options) as client:
        try:
            await bounded(client.load_info())
        except EngineFailed as failed:
            if failed.reason not in ("TLS_FAILED", "UNREACHABLE", "CONNECTION_LOST"):
                raise
            return False
    return True


async def test_a_client_checks_the_server(serve: Serve, settings: Any, ours: Authority, theirs: Authority) -> None:
    address = local((await serve(**settings)).server)
    assert await reaches(address, credentials=tls_credentials(ca=ours.cert))
    assert not await reaches(address, credentials=tls_credentials(ca=theirs.cert))
    assert not await reaches(address, credentials=tls_credentials())
    assert not await reaches(address)  # without TLS
    other = address.replace("localhost", "127.0.0.2")
    assert not await reaches(other, credentials=tls_credentials(ca=ours.cert))  # a name that is not the certificate's
    plain = (await serve()).server.address
    assert not await reaches(plain, credentials=tls_credentials(ca=ours.cert))


async def test_a_certificate_that_is_not_accepted_is_named_as_the_cause(
    serve: Serve, settings: Any, theirs: Authority
) -> None:
    address = local((await serve(**settings)).server)
    client = AsyncSteerClient(address, unary_timeout_s=BOUND_S / 2, credentials=tls_credentials(ca=theirs.cert))
    async with client:
        with pytest.raises(
            EngineFailed, match=f"no connection to the server at {address}: the TLS handshake fails"
        ) as raised:
            await bounded(client.load_info())
    assert raised.value.reason == "TLS_FAILED"  # `steer capture` ends, and does not wait for another certificate


CLIENTS = {
    "its own": (True, "ours", {}),
    "of another authority": (False, "theirs", {}),
    "that has expired": (False, "ours", {"not_before": NOW - 2 * DAY, "not_after": NOW - DAY}),
    "that is not valid yet": (False, "ours", {"not_before": NOW + DAY, "not_after": NOW + 2 * DAY}),
    "none": (False, None, {}),
}


@pytest.mark.parametrize(("accepted", "authority", "options"), CLIENTS.values(), ids=CLIENTS)
async def test_a_server_checks_its_clients(
    serve: Serve,
    settings: Any,
    ours: Authority,
    theirs: Authority,
    accepted: bool,
    authority: str | None,
    options: Any,
) -> None:
    served = await serve(**settings, tls_client_ca=str(ours.cert))
    own = {}
    if authority is not None:
        pem = {"ours": ours, "theirs": theirs}[authority].issue("client", "client.example", **options)
        own = {"cert": pem.cert, "key": pem.key}
    credentials = tls_credentials(ca=ours.cert, **own)
    assert await reaches(local(served.server), credentials=credentials) is accepted


@pytest.mark.parametrize(
    ("kind", "owner"),
    [
        ("a DNS name", "identity client.example"),
        ("a SPIFFE id", "identity spiffe://cluster/ns/a/sa/b"),
        ("a common name alone", "identity only a common name"),
    ],
)
async def test_the_name_in_the_certificate_owns_what_the_call_leaves(
    serve: Serve, settings: Any, ours: Authority, kind: str, owner: str
) -> None:
    backend = FakeBackend()
    served = await serve(backend, **settings, tls_client_ca=str(ours.cert))
    alice = {
        "a DNS name": lambda: ours.issue("alice", "client.example"),
        "a SPIFFE id": lambda: ours.issue_spiffe("spiffe://cluster/ns/a/sa/b", "client.example"),
        "a common name alone": lambda: ours.issue("alice", common_name="only a common name"),
    }[kind]()
    bob = ours.issue("bob", "bob.example")
    for pem in (alice, bob):
        credentials = tls_credentials(ca=ours.cert, cert=pem.cert, key=pem.key)
        async with AsyncSteerClient(local(served.server), credentials=credentials, client_id="one.id") as client:
            await bounded(client.generate("a b", max_tokens=1))
    assert [request.client_id for request in backend.requests[-2:]] == [owner, "identity bob.example"]


async def test_a_token_is_needed_beside_a_certificate_and_names_the_client(
    serve: Serve, settings: Any, ours: Authority, tmp_path: Path
) -> None:
    backend, tokens = FakeBackend(), tmp_path / "tokens.toml"
    await asyncio.to_thread(tokens.write_text, entry("alice", "alices"))
    served = await serve(backend, **settings, tls_client_ca=str(ours.cert), token_file=str(tokens))
    pem = ours.issue("client", "client.example")
    credentials = tls_credentials(ca=ours.cert, cert=pem.cert, key=pem.key)
    async with AsyncSteerClient(local(served.server), credentials=credentials, token="alices") as client:
        await bounded(client.generate("a b", max_tokens=1))
    assert backend.requests[-1].client_id == "identity alice"
    assert not await reaches(local(served.server), token="alices")


async def test_certificates_change_under_load_and_no_call_fails(
    serve: Serve, settings: Any, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(**settings)
    address, calls, done = local(served.server), 0, asyncio.Event()

    async def work() -> None:
        nonlocal calls
        while not done.is_set():  # each with a connection of its own, that is a handshake
            async with AsyncSteerClient(address, credentials=tls_credentials(ca=ours.cert)) as client:
                [text], _ = await client.generate("a b", max_tokens=2)
                assert text
            calls += 1

    async def until(count: int) -> None:
        while calls < count:
            await asyncio.sleep(0.01)

    async def read_again(times: int) -> None:
        while sum("were read again" in record.getMessage() for record in caplog.records) < times:
            await asyncio.sleep(0.01)

    def replace(number: int) -> None:
        new = ours.issue(f"new-{number}", "localhost")
        new.cert.replace(settings["tls_cert"])
        new.key.replace(settings["tls_key"])

    workers = [asyncio.ensure_future(work()) for _ in range(4)]
    await bounded(until(8))
    for number in range(5):
        await asyncio.to_thread(replace, number)
        await bounded(read_again(number + 1))
        await bounded(until(calls + 8))
    done.set()
    await bounded(asyncio.gather(*workers))


def test_files_that_become_bad_change_nothing(settings: Any, ours: Authority, caplog: pytest.LogCaptureFixture) -> None:
    certificates = Certificates(CertificateFiles(cert=settings["tls_cert"], key=settings["tls_key"]))
    certificates.refresh()
    assert certificates._fetch() is None
    Path(settings["tls_key"]).write_text("nonsense")
    with caplog.at_level(logging.ERROR):
        certificates.refresh()
        certificates.refresh()
    assert certificates._fetch() is None
    assert len(caplog.records) == 1
    assert "stay in use" in caplog.records[0].getMessage()
    ours.issue("new", "localhost").key.replace(settings["tls_key"])
    certificates.refresh()
    assert certificates._fetch() is None  # the key of another certificate
    pem = ours.issue("newer", "localhost")
    pem.cert.replace(settings["tls_cert"])
    pem.key.replace(settings["tls_key"])
    certificates.refresh()
    assert certificates._fetch() is not None
    assert certificates._fetch() is None


@pytest.mark.parametrize(
    ("broken", "field", "problem"),
    [
        ({"tls_cert": "/no/such/file"}, "tls_cert", "/no/such/file cannot be read: No such file"),
        ({"tls_cert": "/dev/zero"}, "tls_cert", "/dev/zero cannot be read: it is larger than 4194304 bytes"),
        ({"tls_key": "/no/such/file"}, "tls_key", "/no/such/file cannot be read: No such file"),
        ({"tls_client_ca": "/no/such/file"}, "tls_client_ca", "/no/such/file cannot be read: No such file"),
        ({"tls_key": "{other}"}, "tls_key", "do not belong together"),
        ({"tls_cert": "{text}"}, "tls_key", "do not belong together, or are not valid PEM"),
        ({"tls_client_ca": "{text}"}, "tls_client_ca", "it has no valid certificates"),
        ({"tls_key": ""}, "tls_cert", "it needs tls_key"),
        ({"tls_cert": "", "tls_key": "", "tls_client_ca": "{text}"}, "tls_client_ca", "it needs tls_cert"),
    ],
)
async def test_a_start_with_bad_files_is_refused(
    settings: Any, ours: Authority, theirs: Authority, tmp_path: Path, broken: Any, field: str, problem: str
) -> None:
    text = tmp_path / "text"
    await asyncio.to_thread(text.write_text, "nonsense")
    places = {"{other}": str(theirs.issue("other", "localhost").key), "{text}": str(text)}
    given = {**settings, **{name: places.get(path, path) for name, path in broken.items()}}
    with pytest.raises(InvalidRequest, match=problem) as refused:
        await SteerServer(ServerConfig(address="127.0.0.1:0", **given)).listen()
    assert refused.value.field == field


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_an_address_that_others_reach_needs_tls_or_a_flag(host: str) -> None:
    with pytest.raises(InvalidRequest, match="--tls-cert and --tls-key, or --insecure") as refused:
        await SteerServer(ServerConfig(address=f"{host}:0")).listen()
    assert refused.value.reason == "EXPOSED"


@pytest.mark.parametrize(
    "given", [{"address": "0.0.0.0:0", "insecure": 1}, {"address": "[::1]:0"}, {"address": "127.9.9.9:0"}]
)
async def test_other_addresses_need_none(serve: Serve, given: Any) -> None:
    assert (await serve(**given)).server.address
