"""Shared utilities: registries, files, records, runs, progress."""
