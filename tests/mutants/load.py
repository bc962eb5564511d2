"""Mutants of what bounds the work and the memory that clients can take."""

from tests.mutants.mutant import Mutant, tests_in

LOAD = (
    Mutant(
        name="a handler swallows CancelledError",
        file="steer_service/server/aborted_calls.py",
        old="                self._call.note_gone(self._context)\n",
        new='                log_event(logger, logging.ERROR, "call_failed", places_of(error))\n',
        why="every client that leaves is logged as a defect of the server, and is sent a status",
        killed_by=tests_in(
            "server/test_aborted_calls.py",
            "test_a_client_that_cancels_while_the_engine_works_is_no_error",
            "test_a_client_that_cancels_what_it_does_not_read_is_no_error",
        ),
    ),
    Mutant(
        name="an aborted call keeps the frames that its error passed",
        file="steer_service/server/aborted_calls.py",
        old="            passed.__traceback__ = None\n",
        new="",
        why="rows of failed requests stay in memory until the next garbage collection, in no budget",
        killed_by=tests_in("server/test_freed_at_once.py", "test_live_rows_of_a_request_that_fails"),
    ),
    Mutant(
        name="a released capture keeps its views",
        file="steer_service/server/capture_store.py",
        old="            capture.held.captured = CapturedRows()\n",
        new="",
        why="the segment of a capture that was released while it was fetched stays mapped",
        killed_by=tests_in("server/test_freed_at_once.py", "test_a_capture_that_was_released_while_it_was_fetched"),
    ),
    Mutant(
        name="the client swallows CancelledError",
        file="steer_client/aio.py",
        old="""\
            self._check_not_closed_meanwhile()
            raise
        finally:
""",
        new="""\
            self._check_not_closed_meanwhile()
        finally:
""",
        why="a time limit around a call does not end it",
        killed_by=tests_in(
            "client/test_client_cancel.py",
            "test_cancelling_a_task_that_reads_a_stream_ends_the_request",
            "test_a_time_limit_around_a_stream_ends_the_request",
        ),
    ),
    Mutant(
        name="a place in the queue is lost with the task that gets it",
        file="steer_service/server/fair_queue.py",
        old="                self._end(waiter.share)  # it got its place in the moment in which it was cancelled\n",
        new="                pass\n",
        why="the server serves fewer and fewer requests",
        killed_by=tests_in("server/test_fair_queue.py", "test_who_is_cancelled_leaves_the_queue_or_hands_on_its_place"),
    ),
    Mutant(
        name="places go round among clients",
        file="steer_service/server/fair_queue.py",
        old="min(self._with_waiting(), key=lambda one: self._clients[one].running)",
        new="next(self._with_waiting())",
        why="a client with many long requests gets as many places as one with few",
        killed_by=tests_in(
            "server/test_fair_queue.py", "test_a_client_with_more_running_waits_although_it_is_its_turn"
        ),
    ),
    Mutant(
        name="a full queue refuses whoever comes",
        file="steer_service/server/fair_queue.py",
        old="if heaviest is client or heaviest.weight[unit] <= client.weight[unit] + added:",
        new="if heaviest is not None:",
        why="the client that fills the queue has all others refused",
        killed_by=tests_in(
            "server/test_fair_queue.py", "test_a_full_queue_refuses_the_client_that_fills_it_and_nobody_else"
        ),
    ),
    Mutant(
        name="repeated fields have no limit",
        file="steer_service/wire/message_scan.py",
        old="            if entries > most:\n",
        new="            if entries > 1 and not known.is_repeated:\n",
        why="one legal message of 16 MiB stops the server for half a minute",
        killed_by=tests_in(
            "wire/test_message_scan.py",
            "test_a_field_with_too_many_entries_is_refused_by_name",
            "test_exactly_as_many_entries_as_allowed_are_parsed",
        ),
    ),
    Mutant(
        name="packed entries count as one",
        file="steer_service/wire/message_scan.py",
        old="""\
            if known.is_packed:
                count = self._entries(known, first, position, path)
            elif""",
        new="            if",
        why="400,000 layers of a capture are accepted",
        killed_by=tests_in(
            "wire/test_message_scan.py",
            "test_packed_entries_are_counted",
            "test_exactly_as_many_entries_as_allowed_are_parsed",
        ),
    ),
    Mutant(
        name="an unknown field is accepted",
        file="steer_service/wire/message_scan.py",
        old="""\
            if known is None:
                raise _unknown(tag, path)
""",
        new="""\
            if known is None:
                known = _Field(
                    name="", full_name="", is_repeated=False, is_packed=False, entry_type=tag & 7, message=None
                )
""",
        why="steering that this server does not know is left out in silence",
        killed_by=(
            *tests_in(
                "wire/test_message_scan.py",
                "test_a_field_of_a_later_revision_is_refused_by_its_number",
                "test_unknown_fields_deep_in_the_steering_are_refused",
            ),
            *tests_in("server/test_capture_servicer_fetch.py", "test_a_field_of_a_later_revision_is_refused"),
        ),
    ),
    Mutant(
        name="Generate parses bytes that were not scanned",
        file="steer_service/server/generation_servicer.py",
        old="parts = body.scan(generation_pb2.GenerateRequest, model_limits(self._admission.backend.info))",
        new="parts = dict[str, int]()",
        why="one legal message of 16 MiB stops the server for half a minute",
        killed_by=tests_in(
            "server/test_bad_bytes.py",
            "test_every_method_refuses_a_field_that_it_does_not_know",
            "test_a_request_with_too_many_entries_is_refused_without_waiting_for_a_place",
        ),
    ),
    Mutant(
        name="methods other than Generate parse bytes that were not scanned",
        file="steer_service/server/request_body.py",
        old="        self.scan(kind)\n        return self.parse(kind)",
        new="        return self.parse(kind)",
        why="a fetch of a million layers stops the server for seconds",
        killed_by=tests_in("server/test_bad_bytes.py", "test_every_method_refuses_a_field_that_it_does_not_know"),
    ),
    Mutant(
        name="a long prompt is tokenised before it is measured",
        file="steer_service/runtime/prompt_renderer.py",
        old="            check=LengthCheck(self._tokenizer, self._facts, self._info, "
        "is_rows_only=request.sampling.is_rows_only),\n",
        new="",
        why="a prompt of 16 MiB keeps a thread for a minute and a half",
        killed_by=tests_in(
            "runtime/test_prompt_renderer.py",
            "test_a_conversation_that_is_too_long_is_refused_before_its_boundaries_are_looked_for",
        ),
    ),
    Mutant(
        name="a long text is cut wherever it has no place for it",
        file="steer_service/runtime/prompt_tail.py",
        old="        if len(text) > most:\n",
        new="        if False:\n",
        why="a text of 16 MiB, to be cut to its last tokens, keeps a thread for as long as all of it takes",
        killed_by=tests_in("runtime/test_prompt_tail.py", "test_a_huge_text_without_a_place_to_cut_is_refused"),
    ),
    Mutant(
        name="marks are believed although they change the prompt",
        file="steer_service/runtime/chat_marks.py",
        old="        if text == full_text:\n",
        new="        if text:\n",
        why="rows of a message are those of other positions",
        killed_by=tests_in("runtime/test_chat_marks.py", "test_a_template_without_known_places_says_why"),
    ),
    Mutant(
        name="the watch for slow readers sees no one",
        file="steer_service/server/slow_readers.py",
        old="        self.since = time.monotonic()\n",
        new="        self.since = math.inf\n",
        why="clients that read nothing hold memory and places for ever",
        killed_by=tests_in(
            "server/test_slow_readers.py",
            "test_a_generation_that_nobody_reads_ends_with_a_status_and_frees_everything",
            "test_a_fetch_that_nobody_reads_can_be_continued",
        ),
    ),
    Mutant(
        name="a status waits behind data that nobody reads",
        file="steer_service/server/call_end.py",
        old="        await asyncio.sleep(0)  # lets it put the status behind the data\n",
        new="        await asyncio.wait([status])\n",
        why="a call that was ended still holds everything until its client reads",
        killed_by=(
            *tests_in(
                "server/test_slow_readers.py",
                "test_a_generation_that_nobody_reads_ends_with_a_status_and_frees_everything",
            ),
            *tests_in("server/test_generation_servicer.py", "test_a_token_cancels_a_request_whose_reader_is_slow"),
        ),
    ),
    Mutant(
        name="the server's deadline ends no call",
        file="steer_service/server/admission.py",
        old="call_later(limit_s, end, over)",
        new="call_later(limit_s, lambda: over)",
        why="a request without a deadline of its own runs for ever",
        killed_by=tests_in(
            "server/test_slow_readers.py",
            "test_the_server_ends_a_request_at_its_own_deadline",
            "test_the_deadline_counts_while_a_request_waits_for_its_place",
        ),
    ),
    Mutant(
        name="nothing ends a call of the tokenizer",
        file="steer_service/server/admission.py",
        old="        with self._ended(end):\n            async with self._reading",
        new="        if end:\n            async with self._reading",
        why="a slow text keeps its turn after the deadline, and a stop waits for it",
        killed_by=tests_in(
            "server/test_tokenizer_servicer.py",
            "test_a_call_ends_at_the_deadline_of_the_server",
            "test_a_server_that_stops_ends_every_call",
            "test_calls_end_with_the_engine",
        ),
    ),
    Mutant(
        name="one client has every turn with the tokenizer",
        file="steer_service/server/admission.py",
        old="max(most, READERS), READERS - 1)",
        new="max(most, READERS))",
        why="two slow texts of one client hold up all others",
        killed_by=tests_in("server/test_tokenizer_servicer.py", "test_one_slow_text_does_not_hold_up_another_client"),
    ),
    Mutant(
        name="the timer of a deadline outlives its call",
        file="steer_service/server/admission.py",
        old="            timer.cancel()\n",
        new="",
        why="every request keeps its memory for an hour",
        killed_by=tests_in("server/test_admission.py", "test_a_call_that_has_ended_is_not_ended_again"),
    ),
    Mutant(
        name="a call that has ended stays in the table",
        file="steer_service/server/admission.py",
        old="            self._ends.discard(end)\n",
        new="",
        why="every request keeps its memory until the server stops",
        killed_by=tests_in("server/test_admission.py", "test_a_call_that_has_ended_is_not_ended_again"),
    ),
    Mutant(
        name="an error keeps a client's place among its streams",
        file="steer_service/server/client_streams.py",
        old="""\
        try:
            yield
        finally:
            self._open[share] -= 1
            if not self._open[share]:
                del self._open[share]
""",
        new="""\
        yield
        self._open[share] -= 1
        if not self._open[share]:
            del self._open[share]
""",
        why="after 64 fetches that were cancelled a client is refused for good",
        killed_by=tests_in("server/test_client_streams.py", "test_a_place_is_returned_however_the_stream_ends"),
    ),
    Mutant(
        name="a client's capture memory is not given back",
        file="steer_service/shm/pool.py",
        old="            self._used[client_id] -= size\n",
        new="",
        why="a client's share shrinks with every capture",
        killed_by=tests_in("shm/test_pool.py", "test_one_client_cannot_take_the_share_of_others"),
    ),
    Mutant(
        name="a client's share of the mark memory is not given back",
        file="steer_service/engine/mark_memory.py",
        old="        self._client_bytes[client_id] -= size\n",
        new="",
        why="a client's steered requests take capture memory, in the end all of it",
        killed_by=tests_in("engine/test_mark_memory.py", "test_a_client_has_a_share_and_others_go_on"),
    ),
    Mutant(
        name="memory that was made for a cancelled request stays",
        file="steer_service/engine/region_pool.py",
        old="            creating.add_done_callback(self._release_unwanted)\n",
        new="",
        why="clients that cancel large captures fill the memory for good",
        killed_by=tests_in(
            "engine/test_region_pool.py",
            "test_memory_that_is_made_for_a_request_that_was_cancelled_meanwhile_is_freed",
        ),
    ),
    Mutant(
        name="a segment is not allocated when it is created",
        file="steer_service/shm/segments.py",
        old="os.posix_fallocate(descriptor, 0, size)",
        new="os.ftruncate(descriptor, size)",
        why="a worker dies of SIGBUS when the file system is full",
        killed_by=tests_in(
            "shm/test_segments.py",
            "test_every_byte_is_allocated_so_that_no_later_write_can_fail",
            "test_a_segment_that_cannot_be_mapped_leaves_nothing_behind",
        ),
    ),
    Mutant(
        name="the sweep removes whatever has the prefix",
        file="steer_service/shm/instances.py",
        old='entry.name.startswith(f"{PREFIX}{instance}-")',
        new="entry.name.startswith(PREFIX)",
        why="a server that starts removes the captures of one that runs",
        killed_by=tests_in(
            "shm/test_instances.py",
            "test_the_segments_of_a_process_that_lives_stay",
            "test_files_that_no_dead_process_left_are_not_touched",
        ),
    ),
    Mutant(
        name="the sweep does not ask whether the owner is dead",
        file="steer_service/shm/instances.py",
        old="if not _lock(descriptor) or not _is_at(",
        new="if not _is_at(",
        why="a server that starts removes the captures of one that runs",
        killed_by=tests_in(
            "shm/test_instances.py",
            "test_the_segments_of_a_process_that_lives_stay",
            "test_private_folders_are_removed_with_their_owner_and_not_before",
        ),
    ),
    Mutant(
        name="the server reads captures that it has leased",
        file="steer_service/server/capture_store.py",
        old="if capture is None or capture.session:",
        new="if capture is None:",
        why="a client shortens its segment and the server dies of SIGBUS",
        killed_by=tests_in(
            "server/test_capture_store.py",
            "test_a_lease_is_never_read_by_the_server_for_its_client_can_shorten_the_segment",
        ),
    ),
    Mutant(
        name="a request that fails leaves its captures",
        file="steer_service/server/generation_servicer.py",
        old="            if not is_complete:\n",
        new="            if is_complete is None:\n",
        why="captures whose id nobody has fill the memory until they expire",
        killed_by=tests_in(
            "server/test_capture_servicer_release.py",
            "test_a_request_that_fails_after_it_was_held_leaves_nothing",
            "test_a_request_that_is_cancelled_after_it_was_held_leaves_nothing",
        ),
    ),
    Mutant(
        name="every message that is none is logged",
        file="steer_service/server/aborted_calls.py",
        old="if time.monotonic() >= self._next_at:",
        new="if self._unlogged:",
        why="a client fills the disk with log lines",
        killed_by=tests_in("server/test_bad_bytes.py", "test_many_bad_messages_make_one_line_of_log"),
    ),
    Mutant(
        name="the text of an unexpected error is logged",
        file="steer_service/server/aborted_calls.py",
        old="unexpectedly with {places_of(error)}",
        new="unexpectedly with {error!r}",
        why="prompts end up in the log",
        killed_by=tests_in(
            "server/test_generation_servicer.py", "test_an_unexpected_error_is_internal_and_does_not_repeat_the_prompt"
        ),
    ),
)
