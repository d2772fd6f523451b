"""From grouped-query attention to M2LA: heads rotated, keys and values joined in a latent; the mathematics is NumPy."""
