"""Vision transformers that turn pictures into descriptors and patch tokens, and their files.

Names come from their modules when they are first used: settings need no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
