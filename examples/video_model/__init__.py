"""A small chunk-wise causal video diffusion transformer with a convolutional autoencoder, in plain PyTorch."""
