"""What the files of a model's folder say of it, read with bounds and without torch."""
