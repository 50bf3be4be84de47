"""Episodes from Minari and D4RL, validated once and sampled as windows; no torch here."""
