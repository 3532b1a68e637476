"""The nouns: frozen values without I/O that every layer shares."""
