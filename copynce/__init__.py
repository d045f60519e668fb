"""Image copy detection with PixTrace and CopyNCE.

`load_model` and `Index` are loaded with all that they need when they are first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
