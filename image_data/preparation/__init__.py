"""Image tree, archive or download -> prepared dataset."""
