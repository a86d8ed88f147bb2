"""The version of encdec_fast: the build and the package metadata read this file."""

__version__ = "0.1.0"
