"""One rule a file. Each `apply(config, request, facts, data)` changes its own aspect of the configuration in place."""
