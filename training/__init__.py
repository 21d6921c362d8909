"""Training the bundled model, fine-tuning, and measuring accuracy."""

__all__ = ["benchmarks", "data", "evaluate", "scenes", "stickers", "train"]
