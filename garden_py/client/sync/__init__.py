"""The blocking face of the client: link (performs calls), process, container, client."""
