"""How processes of this host ended."""

import signal


def killed_by(status: int) -> str:
    """What ended a process whose exit status is negative, as `subprocess` gives it: the signal and its usual cause."""
    name = signal.Signals(-status).name
    return f"{name}; the usual cause is too little memory" if name == "SIGKILL" else name
