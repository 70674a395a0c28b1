"""A package of somebody else's that adds a method and a representation to compress: 8-bit floats."""
