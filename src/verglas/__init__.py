"""verglas: particle images in, trustworthy 3-D maps out. Importing this package does no work."""

__version__ = "0.1.0"
