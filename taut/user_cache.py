"""Where taut keeps for a user what it has measured and prepared."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(what: str) -> Path:
    """The folder for one kind of thing; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taut" / what
