"""8-bit inference for PyTorch models. Importing it needs torch alone."""

__version__ = "0.1"
