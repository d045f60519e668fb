"""The pixel executor: DALI pipelines that render edit programs for training, evaluation and people.

Names come from their modules when they are first used; DALI itself is imported when a pipeline is built.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
