"""From descriptors to figures: the challenge's metrics, its files, and the standard protocol.

Names come from their modules when they are first used, so that the metrics load NumPy alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
