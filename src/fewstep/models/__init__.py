"""Denoisers: networks with their schedule and prediction; wrappers, exact models, model folders."""
