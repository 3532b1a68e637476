"""Images: layers fetched, checked, unpacked and kept."""
