"""Where the messages and the special tokens of one prompt are, for positions that are given by them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.spans import Span


@dataclass(frozen=True, kw_only=True)
class PromptPlaces:
    """What is known of a prompt once it is rendered."""

    token_ids: tuple[int, ...] = ()
    """The tokens of the prompt."""
    messages: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat; empty for other prompts, and where they are not known."""
    messages_missing_reason: str = ""
    """Why a chat has no boundaries, a sentence; "" if it has, and for other prompts."""
    special_token_ids: tuple[int, ...] = ()
    """The special tokens of the model."""

    def of_message(self, index: int) -> Span:
        """The positions of a message; -1 is the last one. Raises InvalidRequest if there is no such message.

        Raises also what `check_messages` raises.
        """
        self.check_messages()
        count = len(self.messages)
        if not -count <= index < count:
            raise InvalidRequest(
                f"there is no message {index}: the chat has {count}, 0..{count - 1} or -{count}..-1",
                reason="OUT_OF_RANGE",
            )
        message = self.messages[index]
        return message.start_token, message.end_token

    def of_role(self, role: str) -> Sequence[Span]:
        """The positions of the messages of `role`, which may be none; raises what `check_messages` raises."""
        self.check_messages()
        return self._by_role.get(role, ())

    @cached_property
    def _by_role(self) -> dict[str, list[Span]]:
        """Role -> positions of its messages; a request may name many roles, and often."""
        found: dict[str, list[Span]] = {}
        for message in self.messages:
            found.setdefault(message.role, []).append((message.start_token, message.end_token))
        return found

    def check_messages(self) -> None:
        """Raises InvalidRequest for a prompt that is no chat; Unsupported if the places of messages are not known."""
        if self.messages_missing_reason:
            raise Unsupported(self.messages_missing_reason, reason="MESSAGE_BOUNDARIES")
        if not self.messages:
            raise InvalidRequest("the prompt is not a chat and has no messages", reason="NO_MESSAGES")

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """Which tokens of the prompt are special, as far as the last one that is, shape [that one's position + 1].

        Raises Unsupported if it is not known which tokens are special.
        """
        if not self.special_token_ids:
            raise Unsupported("it is not known which tokens of this model are special", reason="NO_SPECIAL_TOKENS")
        is_special = np.isin(np.array(self.token_ids, np.int32), np.array(self.special_token_ids, np.int32))
        return is_special[: int(np.flatnonzero(is_special).max(initial=-1)) + 1]
