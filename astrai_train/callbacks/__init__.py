"""What a run does beside learning: checkpoints, resuming, signals and its report."""
