"""Training of small models on images."""
