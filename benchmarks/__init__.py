"""Measurements; what they print is what the documents may state."""
