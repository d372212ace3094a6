"""The probability-flow ODE and Dormand–Prince on it."""
