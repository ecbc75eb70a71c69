"""Image files become augmented batches on the device."""
