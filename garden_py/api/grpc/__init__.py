"""The native door: package garden.v1 over gRPC."""
