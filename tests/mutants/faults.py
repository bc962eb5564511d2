"""Mutants of what notices faults: of the engine, of its rows, of the connection."""

from tests.mutants.mutant import Mutant, tests_in

FAULTS = (
    Mutant(
        name="the kernel's rows are as far apart as its block is wide",
        file="steer_service/ops/cuda_kernel.py",
        old="    start = row.to(tl.int64) * WIDTH\n    x_D",
        new="    start = row.to(tl.int64) * BLOCK\n    x_D",
        why="on a GPU every row but the first is steered in the wrong place",
        killed_by=tests_in(
            "engine/test_cuda.py", "test_the_proof_of_the_kernel_finds_nothing_wrong_with_the_kernel_of_a_gpu"
        ),
    ),
    Mutant(
        name="captured rows are no part of the kernel's proof",
        file="steer_service/engine/worker/kernel_proof.py",
        old="        if not torch.equal(captured_TD, want_TD.to(captured_TD.dtype)):",
        new="        if False:",
        why="a server starts that captures other rows than it says",
        killed_by=tests_in("engine/worker/test_kernel_proof.py", "test_a_wrong_plan_and_a_wrong_report_are_found"),
    ),
    Mutant(
        name="the proof does not look at a pass after the steered ones",
        file="steer_service/engine/worker/model_proof.py",
        old="            checks.check_emptied(after_TD)\n",
        new="",
        why="a step without steering is steered by the one before it",
        killed_by=tests_in("engine/test_recorded_graphs.py", "test_the_v1_runner_replays_graphs"),
    ),
    Mutant(
        name="a step that captures more than there is room for replays a graph (V1 runner)",
        file="steer_service/engine/worker/dispatch.py",
        old='            kwargs["force_eager"] = True\n',
        new="            pass\n",
        why="the step ends the engine, since its rows cannot be staged",
        killed_by=tests_in("engine/test_recorded_graphs.py", "test_the_v1_runner_replays_graphs"),
    ),
    Mutant(
        name="a step that captures more than there is room for replays a graph (V2 runner)",
        file="steer_service/engine/worker/dispatch.py",
        old="has_graphs and not is_needed()",
        new="has_graphs",
        why="the step ends the engine, since its rows cannot be staged",
        killed_by=tests_in("engine/test_recorded_graphs.py", "test_the_v2_runner_replays_graphs"),
    ),
    Mutant(
        name="rows of one site are foreseen where both are captured",
        file="steer_service/engine/worker/requests.py",
        old="                pieces = len(request.sites) * min(",
        new="                pieces = min(",
        why="a graph replays a step whose rows cannot be staged",
        killed_by=tests_in("engine/worker/test_requests.py", "test_a_step_never_stages_more_than_is_foreseen"),
    ),
    Mutant(
        name="graphs that no test has replayed are served",
        file="steer_service/engine/worker/self_test.py",
        old="    unseen = modes_to_observe(model.runner) - modes\n",
        new="    unseen = set[str]()\n",
        why="steps run in a way in which nothing was proven",
        killed_by=tests_in("engine/test_recorded_graphs.py", "test_the_v2_runner_replays_graphs"),
    ),
    Mutant(
        name="streams of tensor-parallel ranks are not compared",
        file="steer_service/engine/worker/rank_agreement.py",
        old='"") or _difference([streams for _, streams in answers])',
        new='"")',
        why="one rank steers another stream than the others",
        killed_by=tests_in("engine/test_worker_faults.py", "test_what_one_rank_finds_at_start_is_refused_by_all"),
    ),
    Mutant(
        name="vLLM keeps tokens back that may complete a stop string",
        file="steer_service/engine/engine_request.py",
        old="    needs_each = prepared.options.stop or (capture",
        new="    needs_each = (capture",
        why="an output goes on beyond its stop string for as long as the interval says",
        killed_by=tests_in(
            "engine/test_engine_request.py", "test_vllm_keeps_tokens_back_unless_each_is_needed_at_once"
        ),
    ),
    Mutant(
        name="finite is checked before the cast",
        file="steer_service/core/checks.py",
        old="_stays_below(OVERFLOWS_AT[info.dtype], operation)",
        new='_stays_below(OVERFLOWS_AT["float32"], operation)',
        why="a vector that is infinite in bfloat16 poisons the residual stream",
        killed_by=tests_in("core/test_checks.py", "test_an_add_is_refused_exactly_when_what_it_adds_is_not_finite"),
    ),
    Mutant(
        name="compiling a constraint may take all memory",
        file="steer_service/engine/constraint_child.py",
        old="        resource.setrlimit(resource.RLIMIT_AS, (most, most))\n",
        new="",
        why="a request makes the system kill the server or the engine",
        killed_by=tests_in(
            "engine/test_constraints.py", "test_a_compilation_that_the_system_ends_for_its_memory_is_refused"
        ),
    ),
    Mutant(
        name="a slow constraint is not ended",
        file="steer_service/engine/vllm_patches/constraint_budget.py",
        old="if self.is_given_up or self._left_s < 0.0:",
        new="if self.is_given_up:",
        why="one request stops the steps of all others",
        killed_by=tests_in(
            "engine/vllm_patches/test_constraint_budget.py", "test_a_slow_constraint_ends_its_request_with_a_reason"
        ),
    ),
    Mutant(
        name="a mask is waited for as long as it takes",
        file="steer_service/engine/vllm_patches/constraint_budget.py",
        old="        return time.clock_gettime(self._clock) - self._began > max(self._left_s, 0.0)\n",
        new="        return time.clock_gettime(self._clock) - self._began > 1e9\n",
        why="a grammar that becomes ambiguous after a text stops the tokens of all requests",
        killed_by=tests_in(
            "engine/vllm_patches/test_constraint_budget.py",
            "test_a_mask_that_is_not_made_in_time_is_given_up_and_ends_its_request",
        ),
    ),
    Mutant(
        name="the first row may be infinite",
        file="steer_service/engine/output_rows.py",
        old="        if position is not None:\n",
        new="        if position:\n",
        why="tokens of an unsteered row are returned as steered",
        killed_by=tests_in("engine/test_engine_request.py", "test_no_token_is_yielded_after_a_row_that_is_not_finite"),
    ),
    Mutant(
        name="tokens are yielded without a look at the workers' faults",
        file="steer_service/engine/engine_request.py",
        old="        self._services.counters.check_faults()\n",
        new="",
        why="a rank with a fault stays unsteered while the receipt says steered",
        killed_by=tests_in("engine/test_engine_request.py", "test_no_token_is_yielded_once_a_worker_has_a_fault"),
    ),
    Mutant(
        name="a worker runs whatever program is in the slot",
        file="steer_service/engine/worker/worker_state.py",
        old="request.slot == NO_SLOT or self.bank.holds(request.slot, request.digest)",
        new="request.slot == NO_SLOT or self.bank.digest_of(request.slot)",
        why="a request is steered by the program of another",
        killed_by=tests_in(
            "engine/worker/test_worker_state.py", "test_a_request_is_never_steered_by_a_program_that_is_not_its_own"
        ),
    ),
    Mutant(
        name="a row that was not steered is not noticed",
        file="steer_service/runtime/output_events.py",
        old="        if not is_done.all():\n",
        new="        if not is_done.any():\n",
        why="the receipt of an output that was steered in part says nothing of it",
        killed_by=tests_in(
            "runtime/test_output_events.py", "test_a_row_that_was_neither_steered_nor_reused_fails_the_output"
        ),
    ),
    Mutant(
        name="a layer that was not reached is not noticed",
        file="steer_service/engine/worker/worker_state.py",
        old="        if missed:\n",
        new="        if missed and not plan.rows:\n",
        why="a compiled model without its hooks steers nothing, and the receipt says it did",
        killed_by=tests_in("engine/worker/test_worker_state.py", "test_a_step_that_did_not_reach_a_layer_fails"),
    ),
    Mutant(
        name="captured rows come from the prefix cache",
        file="steer_service/engine/vllm_patches/scheduler.py",
        old="            max_cache_hit_length = min(max_cache_hit_length, limit)\n",
        new="            max_cache_hit_length = max(max_cache_hit_length, limit)\n",
        why="a capture fails whenever another request had the same prompt",
        killed_by=tests_in("engine/vllm_patches/test_scheduler.py", "test_no_captured_row_comes_from_the_prefix_cache"),
    ),
    Mutant(
        name="a reused prefix of a program that failed passes",
        file="steer_service/engine/output_rows.py",
        old="if prefix_failed and self.region.count(REUSED, rows):",
        new="if prefix_failed and not rows:",
        why="tokens follow from keys and values of rows that were not finite",
        killed_by=tests_in(
            "engine/test_engine_request.py",
            "test_no_token_is_yielded_after_a_reused_row_of_a_program_that_failed_meanwhile",
        ),
    ),
    Mutant(
        name="the slot of an output is free before its last step",
        file="steer_service/engine/engine_request.py",
        old="if self._lease is not None and (self._text.stop is not None or self._is_over_budget):",
        new="if self._lease is not None and self._is_over_budget:",
        why="the last step of an output that stopped runs with the next program of its slot",
        killed_by=tests_in(
            "engine/test_engine_request.py",
            "test_the_slot_of_an_output_that_ends_at_a_stop_string_is_kept_for_its_last_step",
        ),
    ),
    Mutant(
        name="a segment is handed out while a worker writes to it",
        file="steer_service/engine/engine_request.py",
        old="        if self._prepared.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED:\n",
        new="        if self._prepared.delivery is CaptureDelivery.SHARED_MEMORY_PREFERRED:\n",
        why="a client that shortens its segment ends the worker",
        killed_by=tests_in(
            "engine/test_engine_request.py",
            "test_rows_in_shared_memory_are_handed_out_when_no_worker_writes_them_any_more",
        ),
    ),
    Mutant(
        name="the prefix-cache salt has no program",
        file="steer_service/engine/prefix_cache.py",
        old='f"steer:{lease.digest}:{prepared.rows.steered_digest}:{epochs.of(lease)}"',
        new='f"steer:{prepared.rows.steered_digest}:{epochs.of(lease)}"',
        why="keys and values that were computed under other steering are reused",
        killed_by=tests_in("engine/test_prefix_cache.py", "test_requests_share_a_salt_only_if_their_rows_are_the_same"),
    ),
    Mutant(
        name="the prefix-cache salt has no epoch",
        file="steer_service/engine/prefix_cache.py",
        old='f"steer:{lease.digest}:{prepared.rows.steered_digest}:{epochs.of(lease)}"',
        new='f"steer:{lease.digest}:{prepared.rows.steered_digest}"',
        why="keys and values of rows that were not finite are reused",
        killed_by=tests_in("engine/test_prefix_cache.py", "test_a_program_that_failed_has_another_salt"),
    ),
    Mutant(
        name="freed marks are used again without a fence",
        file="steer_service/engine/mark_memory.py",
        old="            await self._fence()\n",
        new="            await asyncio.sleep(0)\n",
        why="a worker that is one step behind writes marks of one request to another's",
        killed_by=tests_in(
            "engine/test_mark_memory.py",
            "test_one_fence_serves_all_that_wait_and_all_that_was_freed_before_it",
            "test_a_fence_that_fails_loses_no_block",
        ),
    ),
    Mutant(
        name="a later program takes what an earlier one waits for",
        file="steer_service/engine/slots.py",
        old="    return entry.claimant is None or entry.claimant.number >= waiter.number\n",
        new="    return True\n",
        why="a large program waits as long as small ones come",
        killed_by=tests_in(
            "engine/test_slots_order.py", "test_small_programs_do_not_starve_a_large_one_that_needs_the_whole_bank"
        ),
    ),
    Mutant(
        name="a claimed program takes new users",
        file="steer_service/engine/slots.py",
        old="        if entry is not None and entry.claimant is None:\n            return self._use(entry)\n",
        new="        if entry is not None:\n            return self._use(entry)\n",
        why="a program waits as long as requests come for those in the bank",
        killed_by=tests_in(
            "engine/test_slots_order.py",
            "test_a_stream_of_requests_for_every_program_in_the_bank_does_not_starve_a_waiter",
            "test_new_users_of_a_claimed_program_wait_behind_its_claimant",
        ),
    ),
    Mutant(
        name="a silent process counts as alive",
        file="steer_service/engine/hang_detector.py",
        old="(now.pulse.beats, now.cpu_s) != (before.pulse.beats, before.cpu_s)",
        new="now.pulse.beats >= before.pulse.beats",
        why="a stopped worker hangs every request for ever",
        killed_by=tests_in("engine/test_hang_detector.py", "test_a_process_without_beats_and_processor_time_hangs"),
    ),
    Mutant(
        name="an engine without steps does not hang",
        file="steer_service/engine/hang_detector.py",
        old="if has_stepped or not is_running:",
        new="if has_stepped or is_running:",
        why="an endless loop in a worker hangs every request for ever",
        killed_by=tests_in(
            "engine/test_hang_detector.py", "test_an_engine_that_completes_no_step_while_requests_run_hangs"
        ),
    ),
    Mutant(
        name="log probabilities are not limited by the vocabulary",
        file="steer_service/core/number_limits.py",
        old="min(info.max_logprobs, info.vocab_size)",
        new="info.max_logprobs",
        why="one request ends the engine of a model with few tokens",
        killed_by=tests_in("core/test_number_limits.py", "test_log_probabilities_are_limited_by_a_small_vocabulary"),
    ),
    Mutant(
        name="a number of a request has no row in the table of limits",
        file="steer_service/core/number_limits.py",
        old='    NumberLimit(field="stream_interval", least=0, note="0: all tokens of an output at its end."),\n',
        new="",
        why="a number that nobody checks reaches the engine",
        killed_by=tests_in(
            "core/test_number_limits.py",
            "test_every_number_of_captures_and_positions_has_a_limit",
            "test_the_documentation_has_the_tables",
        ),
    ),
    Mutant(
        name="a draining server takes new requests",
        file="steer_service/server/app.py",
        old="        self._admission.drain()\n",
        new="",
        why="a server that stops never becomes idle, and cuts what it has just accepted",
        killed_by=tests_in("server/test_app.py", "test_draining_lets_requests_finish_and_refuses_new_ones"),
    ),
    Mutant(
        name="a request that kills the engine is run again",
        file="steer_service/server/quarantine.py",
        old="                self._check(key)\n",
        new="",
        why="one request ends the engine until the server gives up",
        killed_by=tests_in("server/test_quarantine.py", "test_the_poison_is_refused_and_all_others_are_served"),
    ),
    Mutant(
        name="deaths of the engine are not counted for their requests",
        file="steer_service/server/app.py",
        old="            self._quarantine.note_death(self._admission.in_engine())\n",
        new="",
        why="one request ends the engine until the server gives up",
        killed_by=tests_in("server/test_quarantine.py", "test_the_poison_is_refused_and_all_others_are_served"),
    ),
    Mutant(
        name="the engine is restarted without end",
        file="steer_service/server/supervisor.py",
        old="        self._restarts.append(now)\n",
        new="",
        why="a server that cannot work never says so to whoever runs it",
        killed_by=tests_in("server/test_supervisor.py", "test_an_engine_that_dies_too_often_ends_the_server"),
    ),
    Mutant(
        name="a late word of the last engine's death ends the next",
        file="steer_service/server/app.py",
        old="if backend is self._backend and not",
        new="if not",
        why="a restart ends in a second one",
        killed_by=tests_in(
            "server/test_supervisor.py", "test_a_request_that_learns_late_of_a_death_does_not_end_the_next_engine"
        ),
    ),
    Mutant(
        name="a fetch is not resumed when its connection was lost",
        file="steer_client/capture_handles.py",
        old='frozenset({"CONNECTION_LOST", "SLOW_READER"})',
        new='frozenset({"SLOW_READER"})',
        why="a proxy's timeout ends the fetch of a large capture",
        killed_by=tests_in("client/test_lost_connections.py", "test_a_fetch_that_a_proxy_resets_is_resumed"),
    ),
    Mutant(
        name="a lost connection has no hint to retry",
        file="steer_client/connection_errors.py",
        old='reason="CONNECTION_LOST", retry_after_s=LOST_RETRY_S',
        new='reason="CONNECTION_LOST"',
        why="a server that was killed looks like a request that cannot succeed",
        killed_by=tests_in(
            "client/test_lost_connections.py",
            "test_a_call_that_ends_without_a_status_of_the_server_is_a_lost_connection",
        ),
    ),
    Mutant(
        name="a stream that was reset is an internal error",
        file="steer_service/wire/status_codes.py",
        old="if code in _CAN_BE_LOST and any(",
        new="if code == grpc.StatusCode.UNAVAILABLE and any(",
        why="a proxy's timeout looks like a defect of the engine",
        killed_by=tests_in(
            "client/test_lost_connections.py",
            "test_a_call_that_ends_without_a_status_of_the_server_is_a_lost_connection",
        ),
    ),
    Mutant(
        name="a server may name any file",
        file="steer_client/shared_memory.py",
        old='if "/" in name or not name.startswith(SEGMENT_PREFIX):',
        new="if not name.startswith(SEGMENT_PREFIX):",
        why="a hostile server has a client map files outside the directory",
        killed_by=tests_in(
            "client/test_broken_captures.py", "test_a_name_that_is_no_file_of_the_directory_is_not_opened"
        ),
    ),
    Mutant(
        name="rows beyond the end of a segment are mapped",
        file="steer_client/shared_memory.py",
        old="if os.fstat(descriptor).st_size < size:",
        new="if os.fstat(descriptor).st_size == 0:",
        why="a client dies of SIGBUS",
        killed_by=tests_in(
            "client/test_broken_captures.py", "test_a_file_that_is_cut_off_before_it_is_mapped_is_an_error"
        ),
    ),
)
