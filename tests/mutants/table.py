"""All mutants."""

from tests.mutants.clients import CLIENTS
from tests.mutants.commands import COMMANDS
from tests.mutants.faults import FAULTS
from tests.mutants.forks import FORKS
from tests.mutants.load import LOAD
from tests.mutants.logs import LOGS
from tests.mutants.places import PLACES
from tests.mutants.programs import PROGRAMS
from tests.mutants.proxy import PROXY
from tests.mutants.starts import STARTS
from tests.mutants.vectors import VECTORS

MUTANTS = (*CLIENTS, *LOAD, *FAULTS, *STARTS, *PROXY, *LOGS, *PLACES, *COMMANDS, *VECTORS, *PROGRAMS, *FORKS)
