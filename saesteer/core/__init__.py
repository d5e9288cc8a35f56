"""The ground floor: models, hooks, sparse autoencoders and shards of activations."""
