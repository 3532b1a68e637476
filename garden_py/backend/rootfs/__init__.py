"""What a container sees as its files: images, mounts, names, and the agent's runtime bundle."""
