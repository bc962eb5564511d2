"""Mutants of the commands: settings, prompts, sampling options and long texts."""

from tests.mutants.mutant import Mutant, tests_in

COMMANDS = (
    Mutant(
        name="a shard waits for its next rows however long it has been open",
        file="steer_service/cli/capture/run.py",
        old="self._due.done():\n                        await self._flush()\n",
        new="self._due.done():\n                        self._due = None\n",
        why="a run that is killed would lose the rows of an hour",
        killed_by=tests_in(
            "cli/capture/test_timed_shards.py",
            "test_a_shard_is_written_once_its_time_is_over",
            "test_a_killed_run_keeps_the_shards_whose_time_was_over",
        ),
    ),
    Mutant(
        name="a run that ends waits for the next prompt",
        file="steer_service/cli/capture/lines_ahead.py",
        old="        self._source.end()\n",
        new="",
        why="a command whose prompts come through a pipe hangs after an error",
        killed_by=tests_in(
            "cli/capture/test_slow_prompts.py", "test_a_command_ends_though_its_standard_input_does_not"
        ),
    ),
    Mutant(
        name="as many tokens as fit are one too many for an engine at the model's own maximum",
        file="steer_service/core/backend.py",
        old="        return self.max_prompt_tokens if is_rows_only else",
        new="        return self.max_model_len if is_rows_only else",
        why="-1 would be refused by the engine, and texts cut to the limit too",
        killed_by=tests_in(
            "client/test_tokenizer.py",
            "test_a_cut_prompt_has_as_many_tokens_as_an_engine_at_the_model_s_own_maximum_takes",
        ),
    ),
    Mutant(
        name="a window of a long text captures its context again",
        file="steer_service/cli/capture/windows.py",
        old="        spans = between(captured, window.first, window.end)\n",
        new="        spans = between(captured, window.start, window.end)\n",
        why="tokens where windows overlap would have two rows, and count twice in a probe",
        killed_by=tests_in(
            "cli/capture/test_windows.py",
            "test_every_token_has_one_row_with_enough_context",
            "test_windows_give_each_token_of_a_text_one_row",
        ),
    ),
    Mutant(
        name="a window is shifted by its special token",
        file="steer_service/cli/capture/windows.py",
        old="        return self.start - len(self.prefix)\n",
        new="        return self.start\n",
        why="rows of every window but the first would be labelled with the token beside theirs",
        killed_by=tests_in("cli/capture/test_windows.py", "test_every_token_has_one_row_with_enough_context"),
    ),
    Mutant(
        name="windows begin without the special token of the text",
        file="steer_service/cli/capture/windows.py",
        old="    prefix = tokens[:1] if tokens[0] in model.special_token_ids else ()\n",
        new="    prefix = ()\n",
        why="models that expect BOS would give other rows in all windows but the first",
        killed_by=tests_in("cli/capture/test_windows.py", "test_every_token_has_one_row_with_enough_context"),
    ),
    Mutant(
        name="pieces of a text are joined at the first equal token",
        file="steer_service/cli/capture/long_texts.py",
        old="        if tokens[at : at + AGREEING] == found[index : index + AGREEING]:\n",
        new="        if True:\n",
        why="a text could be captured with tokens that are not its own",
        killed_by=tests_in("cli/capture/test_long_texts.py", "test_a_tokenizer_whose_next_tokens_differ_is_refused"),
    ),
    Mutant(
        name="several outputs are written to one file of captures",
        file="steer_service/cli/generate.py",
        old="    if namespace.capture is not None and sampling.n not in (None, 1):\n",
        new="    if False:\n",
        why="the rows of all outputs but the first would be lost without a word",
        killed_by=tests_in("cli/test_sampling_arguments.py", "test_an_error_names_the_flag"),
    ),
    Mutant(
        name="a bad variable is found only by the server",
        file="steer_service/cli/main.py",
        old="        if command != CHECKS_ITSELF:\n",
        new='        if command == "serve":\n',
        why="the other commands would run with settings that are not those that were meant",
        killed_by=tests_in(
            "cli/test_bad_settings.py", "test_a_bad_variable_ends_every_command_before_anything_slow_is_imported"
        ),
    ),
    Mutant(
        name="the flags of capture memory do not reach the engine",
        file="steer_service/cli/server_flags.py",
        old="        if getattr(namespace, name) is not None:\n",
        new="        if False:\n",
        why="captures would take more memory than the operator allows",
        killed_by=tests_in(
            "cli/test_server_flags.py", "test_the_flags_of_capture_memory_reach_the_engine_as_variables"
        ),
    ),
)
