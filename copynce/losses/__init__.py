"""Losses: CopyNCE on patch tokens, InfoNCE and KoLeo on descriptors.

Names come from their modules when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
