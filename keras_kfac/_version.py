"""The version, where packaging tools find it without importing TensorFlow."""

__version__ = "0.1.0"
