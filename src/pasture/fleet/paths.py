"""Where a cluster of this machine's own keeps its few files."""

from __future__ import annotations

import os
from pathlib import Path


def state_directory() -> Path:
    """The user's; not made here."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "pasture"
