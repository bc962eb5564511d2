"""Mutants of logs and traces: what must not be in them, and what must end."""

from tests.mutants.mutant import Mutant, tests_in

NOTHING_LEAKS = tests_in("server/test_nothing_leaks.py", "test_no_mark_is_in_a_log_line_a_span_or_a_series")

LOGS = (
    Mutant(
        name="a claimed client is logged by its secret",
        file="steer_service/server/call_record.py",
        old="share if is_proven else",
        new="share if share else",
        why="whoever reads the log can fetch what the client has captured",
        killed_by=tests_in("server/test_call_log.py", "test_a_claimed_client_is_a_hash_and_a_proven_one_a_name"),
    ),
    Mutant(
        name="an x-request-id that is not valid is used",
        file="steer_service/server/call_record.py",
        old="IDENTIFIER.fullmatch(given[0])",
        new="given[0]",
        why="what a client sends as an id is in every log",
        killed_by=NOTHING_LEAKS,
    ),
    Mutant(
        name="an unexpected error is logged with its message",
        file="steer_service/core/log_lines.py",
        old='f"{type(error).__name__} at',
        new='f"{error!r} at',
        why="the message may quote a prompt",
        killed_by=(
            *NOTHING_LEAKS,
            *tests_in("core/test_log_lines.py", "test_an_exception_is_named_with_its_places_and_without_its_message"),
        ),
    ),
    Mutant(
        name="control characters reach a line of text",
        file="steer_service/core/log_lines.py",
        old='return _NOT_PRINTABLE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", " ".join(parts))',
        new='return " ".join(parts)',
        why="a client forges lines of the log",
        killed_by=tests_in("core/test_log_lines.py", "test_no_value_begins_a_line_or_moves_the_cursor"),
    ),
    Mutant(
        name="every refusal is a line",
        file="steer_service/server/call_log.py",
        old="        if unlogged is None:\n            return\n",
        new="",
        why="anyone fills the log",
        killed_by=tests_in("server/test_call_log.py", "test_many_refusals_are_few_lines_which_count_the_others"),
    ),
    Mutant(
        name="the span of a client that goes does not end",
        file="steer_service/server/aborted_calls.py",
        old="            if self._call.span is not None:",
        new="            if self._call.span is not None and not self._call.gone:",
        why="the calls that are missed in a trace are those that failed",
        killed_by=tests_in("server/test_tracing.py", "test_the_span_of_a_call_ends_however_it_ends"),
    ),
)
