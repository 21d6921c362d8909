"""Training the bundled model, fine-tuning, and measuring accuracy."""
