"""Published networks in their published sizes."""
