"""Logs; metrics and traces are to come."""
