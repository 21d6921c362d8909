"""Many requests, fast layers, beams and pages, built on the four files."""
