"""Mutants of what the client does for programs: limits of time, places, retries and causes."""

from tests.mutants.mutant import Mutant, tests_in

PROGRAMS = (
    Mutant(
        name="a silent server is waited for",
        file="steer_client/watched_calls.py",
        old="if silent_s >= self._limit_s:",
        new="if False:",
        why="a call hangs for ever when a server stops sending",
        killed_by=tests_in(
            "client/test_time_limits.py", "test_a_server_that_is_silent_ends_a_generation_without_a_timeout"
        ),
    ),
    Mutant(
        name="the reader's own time counts as silence",
        file="steer_client/watched_calls.py",
        old="        finally:\n            self._asked_at = None",
        new="        finally:\n            pass",
        why="a program that thinks between two pieces loses its stream",
        killed_by=tests_in("client/test_time_limits.py", "test_a_reader_that_takes_its_time_is_not_a_silent_server"),
    ),
    Mutant(
        name="requests in flight are not counted",
        file="steer_service/runtime/places.py",
        old="self._running + 1 <= self._allowed",
        new="True",
        why="all prompts of a call are sent at once, whatever the server has room for",
        killed_by=tests_in("runtime/test_places.py", "test_after_a_refusal_as_many_run_as_the_server_took"),
    ),
    Mutant(
        name="a refusal begins no pause",
        file="steer_service/runtime/places.py",
        old="            self._is_paused = True",
        new="            self._is_paused = False",
        why="a full server is asked in a busy loop",
        killed_by=tests_in("runtime/test_places.py", "test_after_a_refusal_nothing_starts_before_the_pause"),
    ),
    Mutant(
        name="results of a call that failed keep their captures",
        file="steer_service/runtime/many_prompts.py",
        old="                    discard(result)",
        new="                    pass",
        why="captures of prompts whose results are lost stay on the server",
        killed_by=tests_in("client/test_many_prompts.py", "test_the_first_error_names_its_prompt_and_leaves_nothing"),
    ),
    Mutant(
        name="refused prompts are sent again for ever",
        file="steer_service/runtime/retry.py",
        old="    if left_s <= 0:\n        return None",
        new="    left_s = 1.0",
        why="a call with a retry timeout never ends on a server that stays full",
        killed_by=tests_in("client/test_many_prompts.py", "test_without_time_for_retries_a_refusal_is_raised"),
    ),
    Mutant(
        name="an error loses its cause in a list of prompts",
        file="steer_service/runtime/together.py",
        old="raise first from first.__cause__",
        new="raise first from None",
        why="gRPC's own text of a failed connection is gone",
        killed_by=tests_in("client/test_connection_causes.py", "test_no_server"),
    ),
    Mutant(
        name="a proxy's deadline is taken for the caller's",
        file="steer_client/connection_errors.py",
        old="if limit.left_s <= DEADLINE_SLACK_S else",
        new="if True else",
        why="a caller raises its timeout, and the proxy still ends the call",
        killed_by=tests_in(
            "client/test_connection_causes.py", "test_what_a_proxy_says_is_told_from_what_the_server_says"
        ),
    ),
    Mutant(
        name="the password of a proxy is in an error",
        file="steer_client/http_proxies.py",
        old='url.netloc.rpartition("@")[2]',
        new="url.netloc",
        why="the log of a program has a secret",
        killed_by=tests_in("client/test_connection_causes.py", "test_an_http_proxy_and_its_variable_are_named"),
    ),
)
