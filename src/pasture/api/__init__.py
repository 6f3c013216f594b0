"""The HTTP server: OpenAI's wire formats over the `Service` port. Knows `core` and `text`; never the engine or the pool."""

from pasture.api.app import create_app
from pasture.api.server import run
from pasture.api.settings import ApiSettings

__all__ = ["ApiSettings", "create_app", "run"]
