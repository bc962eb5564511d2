"""The limit of open files against the number of requests."""

import resource

import pytest

from steer_service.cli.doctor.open_files import check_open_files
from tests.cli.doctor.found import only


@pytest.mark.parametrize(
    ("hard", "status"),
    [(255, "fail"), (256, "warn"), (2303, "warn"), (2304, "ok"), (resource.RLIM_INFINITY, "ok")],
)
def test_the_limit_of_open_files_must_suffice_for_the_requests(hard: int, status: str) -> None:
    found = only(check_open_files(1024, hard))
    assert found[0] == status
    assert ("ulimit" in found[1]) == (status != "ok")


def test_the_limit_of_this_process_is_read() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert str(hard) in only(check_open_files(1, None))[1] or hard == resource.RLIM_INFINITY
