"""The doors: decode, call the service, encode. A door decides nothing and knows no other door."""
