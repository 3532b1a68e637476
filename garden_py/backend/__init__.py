"""The service's ports made of real files and kernels."""
