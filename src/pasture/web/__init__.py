"""What people look at: the dashboard and the chat page, their files, and the live picture they draw.

Nothing here changes anything. The pages carry no data: they ask the API for it, with the visitor's key.
"""

from pasture.web.latency import Recent
from pasture.web.live import Live
from pasture.web.routes import web_routes

__all__ = ["Live", "Recent", "web_routes"]
