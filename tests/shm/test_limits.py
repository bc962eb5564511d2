"""The limit of open files: as high as the system lets it be."""

import resource

from steer_service.shm.limits import raise_open_files_limit
from tests.shm.folders import open_files_limit


def test_the_limit_of_open_files_is_raised_to_what_is_allowed_and_no_further() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    with open_files_limit(500):
        raise_open_files_limit()

        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
