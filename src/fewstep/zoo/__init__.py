"""The embedded models and feature extractors, and how each was trained."""
