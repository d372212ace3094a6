"""The mathematics of diffusion: schedules, predictions, time grids, noise, integrals."""
