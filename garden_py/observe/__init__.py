"""What the server tells of itself: logs, metrics, traces, and the calls and steps that they are about."""
