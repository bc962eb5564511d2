"""An extension of Griffe: the keywords of a call are in its signature, also those of a TypedDict's bases.

Griffe's own extension moves the fields of a TypedDict into its constructor when it reads the class. Classes that
inherit from it and are read later are then without them, and the order is that of the file system.
"""

from typing import Any

import griffe


class InheritedKeywords(griffe.UnpackTypedDictExtension):
    """Unpacks `**options: Unpack[Keywords]`, and leaves the classes of keywords as they are."""

    def on_class(self, **kwargs: Any) -> None:
        """Keeps the fields where classes inherit them from."""
