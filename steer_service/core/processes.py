"""Why a process of this host ended."""

import signal


def killed_by(status: int) -> str:
    """The signal that killed a process with this negative exit status of `subprocess`, and its usual cause."""
    name = signal.Signals(-status).name
    return f"{name}; the usual cause is too little memory" if name == "SIGKILL" else name
