"""Mutants of what keeps clients apart: owners, secrets and salts."""

from tests.mutants.mutant import Mutant, tests_in

CLIENTS = (
    Mutant(
        name="no owner check when a capture is fetched or released",
        file="steer_service/server/capture_store.py",
        old='capture is not None and capture.owner in ("", owner) else None',
        new="capture is not None else None",
        why="whoever learns a capture id reads what another client captured",
        killed_by=(
            *tests_in("server/test_capture_store.py", "test_a_foreign_capture_looks_like_one_that_never_existed"),
            *tests_in("server/test_capture_servicer_release.py", "test_other_clients_cannot_release"),
            *tests_in(
                "client/test_held_captures.py", "test_another_client_sees_nothing_unless_it_says_the_same_secret"
            ),
        ),
    ),
    Mutant(
        name="no owner check of captures when a release token comes",
        file="steer_service/server/capture_store.py",
        old='for one in self._captures.values() if one.owner in ("", owner)]',
        new="for one in self._captures.values()]",
        why="a client frees captures of another that has chosen the same token",
        killed_by=tests_in("server/test_capture_servicer_release.py", "test_other_clients_cannot_release_by_a_token"),
    ),
    Mutant(
        name="no owner check of running requests when a release token comes",
        file="steer_service/server/admission.py",
        old="if capture is None or active.caller.owner != owner:",
        new="if capture is None:",
        why="a client stops a request of another that has chosen the same token",
        killed_by=tests_in(
            "server/test_capture_servicer_release.py", "test_other_clients_cannot_stop_a_request_by_its_release_token"
        ),
    ),
    Mutant(
        name="a request id cancels like a cancel token",
        file="steer_service/server/admission.py",
        old="self._by_token[active.cancel_token] = active\n",
        new="self._by_token[active.cancel_token] = self._by_token[request.request_id.encode()] = active\n",
        why="request ids are no secrets: a client stops requests of others",
        killed_by=tests_in("server/test_generation_servicer.py", "test_an_unknown_token_cancels_nothing"),
    ),
    Mutant(
        name="a cancel token can be guessed",
        file="steer_service/server/instance.py",
        old="secrets.token_bytes(SECRET_BYTES)",
        new="secrets.token_bytes(4)",
        why="the token is the only right to cancel, and any client may try",
        killed_by=tests_in("server/test_admission.py", "test_cancel_tokens_cannot_be_guessed"),
    ),
    Mutant(
        name="no owner check of an authenticated client's request when a cancel token comes",
        file="steer_service/server/admission.py",
        old="if active.caller.is_authenticated and active.caller.owner != caller.owner:",
        new="if False:",
        why="whoever learns a cancel token stops the request of a client whose name is proven",
        killed_by=tests_in(
            "server/test_foreign_objects.py",
            "test_no_rpc_reads_cancels_or_infers_what_belongs_to_another_client",
        ),
    ),
    Mutant(
        name="any peer may say for whom it calls",
        file="steer_service/server/callers.py",
        old="    if proxy is not None and proxy.trusts(context):\n        name =",
        new="    if proxy is not None:\n        name =",
        why="a client names another one in x-forwarded-client-cert and owns what that one left",
        killed_by=tests_in("server/test_trusted_proxy.py", "test_a_peer_that_is_not_trusted_says_nothing"),
    ),
    Mutant(
        name="a turn that a proxy names has a quota of its own",
        file="steer_service/server/fair_queue.py",
        old="with self._counted(quota_of or share):",
        new="with self._counted(share):",
        why="a client that sends a new fairness id with each request has no limit",
        killed_by=tests_in("server/test_trusted_proxy.py", "test_turns_that_a_proxy_names_are_no_quotas_of_their_own"),
    ),
    Mutant(
        name="the message of an unknown caller is read",
        file="steer_service/server/late_reading.py",
        old="        await check(context)\n        message = await _first(messages, context, timeout_s)\n",
        new="        message = await _first(messages, context, timeout_s)\n        await check(context)\n",
        why="halves of messages of unknown callers fill the server's memory",
        killed_by=tests_in(
            "server/test_trusted_proxy.py", "test_who_needs_no_token_is_known_before_the_message_is_read"
        ),
    ),
    Mutant(
        name="a header without a name is nobody",
        file="steer_service/server/trusted_proxy.py",
        old="        raise nameless()\n    return name",
        new='        return ""\n    return name',
        why="a client whose certificate has no name owns what it claims by its id",
        killed_by=tests_in("server/test_trusted_proxy.py", "test_a_header_that_names_nobody_is_not_allowed"),
    ),
    Mutant(
        name="a certificate that the token file does not have is enough",
        file="steer_service/server/authentication.py",
        old="if identity is not None and self._tokens.has_certificate(identity.name):",
        new="if identity is not None:",
        why="every workload of the mesh may use the server, listed or not",
        killed_by=tests_in("server/test_trusted_proxy.py", "test_a_name_that_the_file_does_not_have_is_not_allowed"),
    ),
    Mutant(
        name="a session of another server is one that has ended",
        file="steer_service/server/generation_servicer.py",
        old="            self._instance.check_own(capture.shared_memory_session, SESSION_FIELD)\n",
        new="",
        why="behind a balancer a client is told that its memory is not shared, and never asks the right server",
        killed_by=tests_in(
            "server/test_instance.py",
            "test_a_session_of_another_server_is_refused_where_shared_memory_is_required",
        ),
    ),
    Mutant(
        name="request ids are shared by all clients",
        file="steer_service/server/admission.py",
        old="key = caller.namespace, request.request_id",
        new='key = "", request.request_id',
        why="a client learns which ids others use, and blocks them",
        killed_by=tests_in("server/test_callers.py", "test_request_ids_are_each_callers_own"),
    ),
    Mutant(
        name="a vector is found by its digest alone",
        file="steer_service/server/vector_store.py",
        old="""\
        stored = self._by_use.get((client_id, digest))
        if stored is not None:
            self._note_use(stored)
            self._by_use.move_to_end((client_id, digest))
            self._shares[client_id].vectors.move_to_end(digest)
""",
        new="""\
        stored = next((one for one in self._by_use.values() if one.digest == digest), None)
        if stored is not None:
            self._note_use(stored)
            self._by_use.move_to_end((stored.client_id, digest))
            self._shares[stored.client_id].vectors.move_to_end(digest)
""",
        why="GetVector returns vectors of other clients",
        killed_by=tests_in("server/test_stored_vectors.py", "test_vectors_belong_to_their_client_only"),
    ),
    Mutant(
        name="a list has the vectors of all clients",
        file="steer_service/server/vector_store.py",
        old="reversed(share.vectors.values())",
        new="reversed(self._by_use.values())",
        why="ListVectors tells what other clients have stored",
        killed_by=(
            *tests_in("server/test_stored_vectors.py", "test_vectors_belong_to_their_client_only"),
            *tests_in(
                "server/test_vector_store.py", "test_a_client_over_its_share_loses_its_own_vectors_and_not_others"
            ),
        ),
    ),
    Mutant(
        name="callers without an id own vectors together",
        file="steer_service/server/callers.py",
        old="        if not self.owner:\n",
        new="        if self.owner is None:\n",
        why="everybody without an id lists and deletes the vectors of all others",
        killed_by=tests_in("server/test_callers.py", "test_without_an_id_nothing_is_stored_listed_or_deleted"),
    ),
    Mutant(
        name="a session of another client is accepted",
        file="steer_service/server/shared_memory_sessions.py",
        old="session in self._owner_of_session and self._owner_of_session[session] == owner",
        new="session in self._owner_of_session",
        why="captures are leased to a client that never proved that it shares the memory",
        killed_by=(
            *tests_in("server/test_shared_memory_sessions.py", "test_reading_the_nonce_opens_a_session"),
            *tests_in(
                "server/test_capture_servicer_shared_memory.py",
                "test_without_a_session_required_is_refused_and_preferred_falls_back_to_inline",
            ),
        ),
    ),
    Mutant(
        name="a challenge of another client is answered",
        file="steer_service/server/shared_memory_sessions.py",
        old="challenge is None or challenge.owner != owner",
        new="challenge is None",
        why="a client uses up the challenges of others",
        killed_by=(
            *tests_in(
                "server/test_shared_memory_sessions.py",
                "test_another_clients_challenge_is_unknown_and_stays_with_its_owner",
            ),
            *tests_in(
                "server/test_capture_servicer_shared_memory.py",
                "test_a_challenge_is_answered_only_by_the_client_that_asked",
            ),
        ),
    ),
    Mutant(
        name="a nonce is compared with !=",
        file="steer_service/server/shared_memory_sessions.py",
        old="not hmac.compare_digest(challenge.nonce, nonce)",
        new="challenge.nonce != nonce",
        why="the time of the answer tells how much of a guess is right",
        killed_by=tests_in("server/test_secrets.py", "test_the_server_compares_no_secret_in_a_time_that_depends_on_it"),
    ),
    Mutant(
        name="a signature is compared with ==",
        file="steer_service/server/vector_servicer.py",
        old="hmac.compare_digest(token[16:], self._signature(last_use, owner))",
        new="token[16:] == self._signature(last_use, owner)",
        why="the time of the answer tells how much of a guess is right",
        killed_by=tests_in("server/test_secrets.py", "test_the_server_compares_no_secret_in_a_time_that_depends_on_it"),
    ),
    Mutant(
        name="a page token is not signed",
        file="steer_service/server/vector_servicer.py",
        old="""\
            if hmac.compare_digest(token[16:], self._signature(last_use, owner)):
                return last_use
""",
        new="            return last_use\n",
        why="a client makes page tokens of its own, or uses those of others",
        killed_by=tests_in("server/test_callers.py", "test_page_tokens_tell_nothing_and_are_their_clients_own"),
    ),
    Mutant(
        name="all clients have the same prefix-cache salt",
        file="steer_service/server/generation_servicer.py",
        old='f"{caller.namespace}\\0{request.cache_salt}"',
        new='f"\\0{request.cache_salt}"',
        why="cached_tokens tells one client what another has sent",
        killed_by=tests_in("server/test_callers.py", "test_with_isolation_no_client_reuses_prompts_of_another"),
    ),
    Mutant(
        name="authenticated clients are not isolated by default",
        file="steer_service/server/generation_servicer.py",
        old='(isolation == "auto" and not caller.is_authenticated)',
        new='isolation == "auto"',
        why="cached_tokens tells one client what another has sent",
        killed_by=tests_in(
            "server/test_callers.py", "test_by_default_authenticated_clients_reuse_no_prompts_of_each_other"
        ),
    ),
    Mutant(
        name="a client evicts recent vectors of others",
        file="steer_service/server/vector_store.py",
        old="if one.client_id == client_id or one.used_at <= since)",
        new="if one.used_at <= since + self._protected_s)",
        why="whoever invents client ids empties everybody's share",
        killed_by=tests_in(
            "server/test_vector_store.py", "test_a_client_evicts_its_own_vectors_and_no_recent_ones_of_others"
        ),
    ),
    Mutant(
        name="a request is quarantined for every client",
        file="steer_service/server/quarantine.py",
        old="(request.client_id, request.model,",
        new="(request.model,",
        why="a client makes the server refuse a request of another",
        killed_by=tests_in(
            "server/test_quarantine.py", "test_a_request_is_recognised_by_its_client_and_content_whatever_its_id"
        ),
    ),
)
