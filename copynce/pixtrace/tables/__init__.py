"""Coordinate tables: traced, bridged, reversed, counted; one at a time and in batches."""
