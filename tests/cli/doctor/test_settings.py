"""Environment variables, certificates and tokens, valid and not."""

import datetime
from pathlib import Path

import pytest

from steer_service.cli.doctor.settings import check_certificates, check_settings, check_tokens, expiry_of, read_config
from steer_service.server.certificates import CertificateFiles
from tests.cli.doctor.found import only
from tests.server.test_certificates import DAY, NOW, Authority, ours, theirs  # noqa: F401  (fixtures)
from tests.server.test_tokens import entry


def settings_of(environment: dict[str, str]) -> list[tuple[str, str]]:
    _, problem = read_config(environment)
    return [(str(found.status), found.text) for found in check_settings(environment, problem)]


def test_valid_variables_are_counted() -> None:
    assert settings_of({}) == [("ok", "no STEERLLM_* variable is set")]
    assert settings_of({"STEERLLM_GRACE_S": "5", "STEERLLM_TEST_X": "1", "HOME": "/"}) == [
        ("ok", "1 variables STEERLLM_* are set")
    ]


def test_bad_values_fail_and_unknown_names_are_warnings() -> None:
    found = settings_of({"STEERLLM_GRACE_S": "abc", "STEERLLM_MERTICS_PORT": "1"})
    assert found[0] == (
        "fail",
        "STEERLLM_GRACE_S: 'abc' is not a number; docs/configuration.md has the range of every variable",
    )
    assert found[1][0] == "warn"
    assert "did you mean STEERLLM_METRICS_PORT?" in found[1][1]
    config, problem = read_config({"STEERLLM_SHM_DIR": "/no/such/folder"})
    assert (config, problem) == (None, "shm_dir: '/no/such/folder' is not a directory")


def test_a_variable_that_kubernetes_sets_for_a_service_is_named() -> None:
    found = settings_of({"STEERLLM_METRICS_PORT": "tcp://10.0.0.7:9090", "STEERLLM_SERVICE_HOST": "10.0.0.7"})
    assert [status for status, _ in found] == ["fail", "fail"]
    assert "which Kubernetes sets for a Service of that name; set enableServiceLinks: false" in found[0][1]
    assert "is not a whole number" in found[1][1]


def files_of(authority: Authority, **options: object) -> CertificateFiles:
    pem = authority.issue("server", "localhost", **options)
    return CertificateFiles(cert=str(pem.cert), key=str(pem.key))


@pytest.mark.parametrize(("days", "status"), [(100, "ok"), (3, "warn"), (-1, "fail")])
def test_a_certificate_is_judged_by_its_time(ours: Authority, days: int, status: str) -> None:  # noqa: F811
    files = files_of(ours, not_before=NOW - 9 * DAY, not_after=NOW + days * DAY)
    found = only(check_certificates(files))
    assert found[0] == status
    if status == "fail":
        assert "certificate has expired" in found[1]
    else:
        assert abs(expiry_of(files) - (NOW + days * DAY)) < datetime.timedelta(seconds=2)


def test_certificates_that_cannot_be_used_fail(ours: Authority, theirs: Authority, tmp_path: Path) -> None:  # noqa: F811
    files = files_of(ours)
    other = theirs.issue("other", "localhost")
    for bad, problem in (
        (
            CertificateFiles(cert=files.cert, key=str(other.key)),
            "tls_key: this key and tls_cert do not belong together",
        ),
        (CertificateFiles(cert=str(tmp_path / "none"), key=files.key), f"tls_cert: {tmp_path}/none cannot be read"),
        (CertificateFiles(cert=files.cert, key=files.key, client_ca=files.key), "tls_client_ca: it has no valid"),
    ):
        status, text = only(check_certificates(bad))
        assert (status, text.startswith(problem)) == ("fail", True), text
    assert only(check_certificates(None))[0] == "ok"


def test_tokens_are_read_and_expired_clients_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    assert only(check_tokens(""))[0] == "ok"
    assert only(check_tokens(str(path))) == (
        "fail",
        f"{path}: it cannot be read: No such file or directory; `steer token NAME --file {path}` writes such a file",
    )
    path.write_text(entry("alice", "a") + entry("bob", "b"))
    assert only(check_tokens(str(path))) == ("ok", f"{path} has 2 clients")
    path.write_text(entry("alice", "a") + entry("bob", "b", expires="2001-01-01T00:00:00Z"))
    status, text = only(check_tokens(str(path)))
    assert (status, "1 of 2 clients have expired, such as bob" in text) == ("warn", True)
