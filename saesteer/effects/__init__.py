"""What an edit does to a model."""
