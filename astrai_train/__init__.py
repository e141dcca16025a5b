"""Training: data, objectives and the Lightning command line."""
