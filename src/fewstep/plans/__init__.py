"""Samplers as data: the plan, where solvers write it, the loop that runs it."""
