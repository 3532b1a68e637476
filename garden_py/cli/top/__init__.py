"""`garden top`, a live table of containers. Pure: samples, keys, view, draw. Acting: screen, asking, command."""
