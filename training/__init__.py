"""From text to activations to a trained sparse autoencoder."""
