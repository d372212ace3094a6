"""Sampling: from a request to samples."""
