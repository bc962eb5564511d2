"""Mutants of how a server starts: when it accepts connections, and whether its address is its own."""

from tests.mutants.mutant import Mutant, tests_in

STARTS = (
    Mutant(
        name="a port that should wait for the model is opened at once",
        file="steer_service/server/app.py",
        old="        if self.config.listen_when_ready:\n",
        new="        if False:\n",
        why="a TCP probe takes a server that loads its model for a ready one",
        killed_by=tests_in(
            "server/test_listen_when_ready.py", "test_no_connection_is_accepted_before_the_first_generation"
        ),
    ),
    Mutant(
        name="an address that waits for the model is not kept",
        file="steer_service/server/bind.py",
        old="        if not address.startswith(UNIX):\n            host, port",
        new="        if False:\n            host, port",
        why="another server takes the address, and this one learns it after minutes",
        killed_by=tests_in(
            "server/test_listen_when_ready.py", "test_no_other_server_takes_the_address_while_the_model_loads"
        ),
    ),
)
