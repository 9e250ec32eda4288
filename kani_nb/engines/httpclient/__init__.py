"""The HTTP client of engines whose model runs elsewhere: `BaseClient`, and the errors it raises."""

from kani_nb.engines.httpclient.client import BaseClient, ServerEvent
from kani_nb.engines.httpclient.errors import (
    AccessRefusedError,
    RateLimitError,
    ServerDownError,
    ServerError,
    ServerTimeoutError,
)

__all__ = [
    "AccessRefusedError",
    "BaseClient",
    "RateLimitError",
    "ServerDownError",
    "ServerError",
    "ServerEvent",
    "ServerTimeoutError",
]
