"""Generated from proto/ by scripts/protoc; never edited, imported only by api/ and client/."""
