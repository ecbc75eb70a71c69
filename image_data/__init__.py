"""Image files -> augmented batches on the device."""
