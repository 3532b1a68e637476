"""Helpers of the tests: clients, fakes, namespaces."""
