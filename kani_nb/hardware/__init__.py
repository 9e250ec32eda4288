"""What the machine is and what fits on it."""
