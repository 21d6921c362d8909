"""Many requests, fast layers, beams and pages, built on the four files."""

__all__ = ["batch", "beam", "convert", "fast", "page", "shortcuts"]
