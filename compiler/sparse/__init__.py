"""Block-sparse matrices in plain NumPy."""
