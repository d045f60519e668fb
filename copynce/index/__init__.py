"""A growing index of pictures on the disk: made of files, kept up to date, searched.

Names come from their modules when they are first used: settings need no library.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
