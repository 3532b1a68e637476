"""The verbs: the one core that every door speaks to. Start reading at containers.py."""
