"""A hint for callers whose text has the BOS token that the tokenizer adds again."""

import re
import warnings
from collections.abc import Sequence

from steer_service.core.prompt import TextPrompt

TAG = re.compile(r"<[^<>\s]{1,64}>|\[[A-Z_]{1,64}\]")
"""What BOS tokens look like. Such a text is one token only if it is a special token."""


def warn_of_second_bos(prompt: TextPrompt, token_ids: Sequence[int]) -> None:
    """Warns if `token_ids`, those of `prompt`, begin with the same special token twice: all positions are one off."""
    if prompt.add_special_tokens and len(token_ids) > 1 and token_ids[0] == token_ids[1]:
        found = TAG.match(prompt.text)
        if found is not None:
            warnings.warn(
                f"the text begins with {found[0]}, which the tokenizer added again; add_special_tokens=False adds none",
                UserWarning,
                stacklevel=2,
            )
