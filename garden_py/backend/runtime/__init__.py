"""The OCI runtime's command line: arguments in, typed results out."""
