"""Output and input of processes: from the agent's pipes to segment files, and from there to any number of readers."""
