"""Descriptors of many pictures: made, kept in files, searched and normalised. Names are imported from the modules."""
