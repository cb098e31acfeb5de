"""Many processes, one run: who they are, what they add up, who works on which particles. Knows nothing of particles or maps."""
