"""deploykit: the fastest engine for the hardware at hand that keeps the accuracy, with the evidence."""

__version__ = "0.1.0"
