"""Imported last by the fork server: a garbage collection in a child would copy every page that the children share."""

import gc

gc.collect()
gc.freeze()
