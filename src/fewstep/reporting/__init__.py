"""Figures, pictures, pages."""
