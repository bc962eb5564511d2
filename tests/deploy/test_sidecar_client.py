"""The example of a client in the server's pod, against a server with the settings of that pod."""

import hashlib
import importlib.util
from pathlib import Path

import trustme

from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.arena import Arena
from tests.client.conftest import Serve, serve  # noqa: F401  (a fixture)
from tests.deploy.rendered import KUBERNETES, environment

SCRIPT = KUBERNETES / "components/sidecar-client/client.py"


def test_the_client_maps_captures_of_a_server_with_tls_and_tokens(serve: Serve, tmp_path: Path) -> None:  # noqa: F811
    authority = trustme.CA()
    certificate = authority.issue_cert("steerllm")  # the service's name, as deploy/README.md says
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("a-secret\n")
    digest = hashlib.sha256(b"a-secret").hexdigest()
    (tmp_path / "tokens.toml").write_text(f'[clients.sidecar]\nsha256 = ["{digest}"]\n')
    (tmp_path / "captures").mkdir()
    captures, variables = tmp_path / "captures", environment("sidecar-client")
    server = serve(
        FakeBackend(place=Arena(captures)),
        tls_cert=str(tmp_path / "tls.crt"),
        tls_key=str(tmp_path / "tls.key"),
        token_file=str(tmp_path / "tokens.toml"),
        shm_dir=str(captures),
        shm_mode=variables["STEERLLM_SHM_MODE"],
    )
    spec = importlib.util.spec_from_file_location("sidecar_client", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    with example.connected(server.address, credentials=tmp_path, captures=captures) as model:
        rows, width = example.shape_of_a_capture(model)
    assert width == FAKE_MODEL.hidden_size
    assert rows > 8
