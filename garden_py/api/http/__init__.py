"""The Garden door: the Garden HTTP/JSON protocol over the same service as gRPC. Decode, call the service, encode."""
