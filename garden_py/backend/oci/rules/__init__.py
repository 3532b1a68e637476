"""One rule a file: each `apply(config, request, facts, data)` changes its own aspect of the configuration."""
