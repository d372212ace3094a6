"""Networks in one coordinate system: denoisers and what wraps them, exact models, model folders."""
