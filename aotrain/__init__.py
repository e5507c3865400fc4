"""Training-time low precision for PyTorch."""
