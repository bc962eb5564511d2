"""The rules of the settings that are numbers or words of a list; checking them imports nothing that is slow.

`server.config.ServerConfig` has the settings and their defaults. Every command checks the environment variables by
these rules before it imports anything else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from steer_service.core.environment import PREFIX
from steer_service.core.errors import InvalidRequest
from steer_service.core.log_lines import FORMATS, LEVELS

PREFIX_ISOLATION = ("auto", "client", "none")
"""Values of `prefix_isolation`."""

SOCKET_MODES = ("600", "660", "666")
"""Permissions that a Unix socket may have."""

MOST_SECONDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberRule:
    """The range of a number."""

    kind: type[int] | type[float]
    """Whole numbers or any."""
    least: float = 0
    """The least value."""
    most: float | None = None
    """The greatest value; None: no limit."""
    unit: str = ""
    """The unit, for the message."""

    def check(self, name: str, value: float) -> None:
        """Raises InvalidRequest with the field `name` for a value outside the range."""
        is_within = self.least <= value and (self.most is None or value <= self.most)  # NaN is not
        if is_within and value != float("inf"):
            return
        if self.most is None:
            raise InvalidRequest(f"{value} is negative", field=name)
        raise InvalidRequest(f"{value} is outside {self.least}..{self.most}{self.unit}", field=name)

    def read(self, name: str, text: str) -> float:
        """The number in `text`; raises InvalidRequest with the field `name` for anything else."""
        try:
            value = self.kind(text)
        except ValueError:
            raise InvalidRequest(f"{text!r} is not a {self.noun}", field=name) from None
        self.check(name, value)
        return value

    @property
    def noun(self) -> str:
        """What a value is, for messages."""
        return "whole number" if self.kind is int else "number"


COUNT = NumberRule(kind=int)
POSITIVE = NumberRule(kind=int, least=1, most=2**31 - 1)
FLAG = NumberRule(kind=int, most=1)
SECONDS = NumberRule(kind=float, most=MOST_SECONDS, unit=" seconds")

NUMBERS: Mapping[str, NumberRule] = {
    **dict.fromkeys(
        ("max_message_bytes", "max_concurrent_requests", "max_client_fetches", "max_client_sessions"), POSITIVE
    ),
    **dict.fromkeys(
        (
            "vector_store_bytes",
            "client_vector_bytes",
            "max_running_requests",
            "max_client_requests",
            "max_queued_bytes",
            "max_queued_tokens",
            "max_restarts",
        ),
        COUNT,
    ),
    **dict.fromkeys(("shared_memory", "insecure", "listen_when_ready"), FLAG),
    "metrics_port": NumberRule(kind=int, most=65535),
    **dict.fromkeys(
        (
            "grace_s",
            "retry_after_s",
            "restart_window_s",
            "step_timeout_s",
            "shm_ttl",
            "send_timeout_s",
            "max_deadline_s",
            "lame_duck_s",
            "heartbeat_s",
        ),
        SECONDS,
    ),
}
"""Setting -> the rule of its number."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "prefix_isolation": PREFIX_ISOLATION,
    "log_level": LEVELS,
    "log_format": FORMATS,
    "uds_mode": SOCKET_MODES,
}
"""Setting -> the words that it may be."""

IN_ANY_CASE = ("log_level", "log_format")
"""Settings whose words may be in upper case, as in vLLM's variables."""

GIB = ("max_shm_gb", "client_shm_gb")
"""Settings of the engine: numbers of GiB."""

SWITCHES: Mapping[str, bool] = {"1": True, "true": True, "yes": True, "on": True} | dict.fromkeys(
    ("", "0", "false", "no", "off"), False
)
"""Words of the setting `capture_metadata`, in any case."""


def check_word(name: str, word: str) -> str:
    """The word in the case of `WORDS`; raises InvalidRequest with the field `name` for one that is not among them."""
    known = word.lower() if name in IN_ANY_CASE else word
    if known not in WORDS[name]:
        raise InvalidRequest(f"{word!r} is not one of {', '.join(WORDS[name])}", field=name)
    return known


def gib_from(name: str, text: str) -> float:
    """The GiB in `text`; raises InvalidRequest with the field `name` for anything but a positive number."""
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0.0 < gib < float("inf"):
        raise InvalidRequest(f"{text!r} is not a positive number of GiB", field=name)
    return gib


def switch_from(name: str, text: str) -> bool:
    """The switch in `text`; raises InvalidRequest with the field `name` for a word that is none."""
    switch = SWITCHES.get(text.strip().lower())
    if switch is None:
        raise InvalidRequest(f"{text!r} is not 0, 1, true, false, yes, no, on or off", field=name)
    return switch


def check_environment(environment: Mapping[str, str]) -> None:
    """Raises InvalidRequest, whose field is the variable, for the first variable that breaks a rule of this file."""
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or variable != variable.upper():
            continue
        if name in NUMBERS:
            NUMBERS[name].read(variable, text)
        elif name in WORDS:
            _check_word_of(variable, name, text)
        elif name in GIB:
            gib_from(variable, text)
        elif name == "capture_metadata":
            switch_from(variable, text)


def _check_word_of(variable: str, name: str, text: str) -> None:
    try:
        check_word(name, text)
    except InvalidRequest as error:
        error.field = variable
        raise
