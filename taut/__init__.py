"""taut takes the slack out of a transformer, and proves that it is still the same model."""

__version__ = "0.1.0"
