"""Examples: a small autoregressive video model, its training, and a demo of 2-bit cache generation."""
