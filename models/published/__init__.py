"""Networks of published papers, with their published sizes."""
