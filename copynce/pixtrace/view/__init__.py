"""A program on one picture, composed: what both executors read."""
