"""Image copy detection with PixTrace and CopyNCE."""

__version__ = "0.1.0"
