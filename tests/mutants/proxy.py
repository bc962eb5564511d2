"""Mutants of the files of deploy/envoy: what keeps calls away from replicas that cannot serve them."""

from tests.mutants.mutant import Mutant, tests_in

EDGE = "deploy/envoy/edge.yaml"

PROXY = (
    Mutant(
        name="Envoy balances over all replicas when none is healthy",
        file=EDGE,
        old="healthy_panic_threshold: { value: 0 }",
        new="healthy_panic_threshold: { value: 50 }",
        why="replicas that load or stop get calls",
        killed_by=tests_in("deploy/test_replicas.py", "test_a_replica_that_is_not_serving_gets_no_call"),
    ),
    Mutant(
        name="Envoy sends no call that names its replica to one that drains",
        file=EDGE,
        old="statuses: [UNKNOWN, HEALTHY, DEGRADED, UNHEALTHY, DRAINING]",
        new="statuses: [UNKNOWN, HEALTHY, DEGRADED]",
        why="captures that a stopping replica holds are lost",
        killed_by=tests_in("deploy/test_replicas.py", "test_a_draining_replica_still_hands_out_its_captures"),
    ),
    Mutant(
        name="Envoy does not repeat what a replica refuses",
        file=EDGE,
        old="retry_on: connect-failure,refused-stream,reset,unavailable",
        new="retry_on: connect-failure,refused-stream,reset",
        why="calls fail while a replica begins to stop",
        killed_by=tests_in("deploy/test_replicas.py", "test_a_draining_replica_loses_nothing"),
    ),
    Mutant(
        name="Envoy looks for replicas once a minute while there is no traffic",
        file=EDGE,
        old="no_traffic_interval: 1s",
        new="no_traffic_interval: 60s",
        why="replicas that start after their Envoy get no call for a minute",
        killed_by=tests_in("deploy/test_replicas.py", "test_replicas_that_start_after_their_envoy_are_noticed"),
    ),
    Mutant(
        name="Envoy ejects a replica for errors in responses",
        file=EDGE,
        old="enforcing_consecutive_5xx: 0",
        new="enforcing_consecutive_5xx: 100",
        why="five bad calls of one client take a replica from all",
        killed_by=tests_in("deploy/test_edge.py", "test_errors_that_clients_cause_eject_no_replica"),
    ),
    Mutant(
        name="Envoy passes on what a client says of its certificate",
        file=EDGE,
        old="forward_client_cert_details: SANITIZE",
        new="forward_client_cert_details: ALWAYS_FORWARD_ONLY",
        why="a client claims a name that it cannot prove",
        killed_by=tests_in(
            "deploy/test_sidecar.py", "test_the_names_in_a_certificate_reach_the_server_and_claims_do_not"
        ),
    ),
)
