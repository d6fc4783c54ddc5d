"""The REST API. Its Ray Serve deployment is in `deployment`, which alone imports Ray."""

from .app import build_gateway
from .deps import GatewayDeps
from .tokenizer import TextTokenizer

__all__ = ["GatewayDeps", "TextTokenizer", "build_gateway"]
