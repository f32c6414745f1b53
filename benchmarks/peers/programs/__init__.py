"""The libraries that Trident is compared with. A module imports its library, NumPy and `interface`, and no more."""
