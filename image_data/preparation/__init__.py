"""A tree or an archive of images becomes a prepared dataset."""
