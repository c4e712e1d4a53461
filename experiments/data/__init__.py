"""Images: opened by name, held or streamed, augmented, in batches."""
