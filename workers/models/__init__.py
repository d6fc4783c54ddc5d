"""Model families, one file each, over the layers they share."""

from .decoder import Decoder
from .registry import load_model

__all__ = ["Decoder", "load_model"]
