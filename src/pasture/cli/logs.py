"""Log lines for programs: one JSON object a line.

Each has `time` (UTC), `level`, `logger` and `message`, the `request_id` where there is one, and
the numbers that belong to an answered request (`method`, `path`, `status`, `seconds`). What people wrote is in no line.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from pasture.core.context import REQUEST_ID

_NUMBERS = ("method", "path", "status", "seconds")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request_id := REQUEST_ID.get()) is not None:
            line["request_id"] = request_id
        line |= {name: record.__dict__[name] for name in _NUMBERS if name in record.__dict__}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
