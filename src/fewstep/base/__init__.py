"""What every room stands on: registries, files."""
