"""pasture: one llama.cpp model for a whole team, on one shared KV cache."""

__version__ = "0.1.0"
