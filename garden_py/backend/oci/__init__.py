"""OCI configurations: a fold of small rules over the data in vendor/runc-config."""
