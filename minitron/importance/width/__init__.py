"""Width scoring: its section, and what its metrics share."""
