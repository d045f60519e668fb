"""Descriptors in files."""

from copynce.retrieval.features import FeatureFile, Features, read_features, write_features

__all__ = ["FeatureFile", "Features", "read_features", "write_features"]
