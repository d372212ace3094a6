"""The networks of embedded models and of ``fewstep train``."""
