"""The pixel executor: DALI pipelines that render edit programs for training, evaluation and people.

DALI itself is imported when a pipeline is built, not before.
"""

from dali_pipelines.loaders import Pair, PairLoader, PictureLoader, render_programs
from dali_pipelines.sources import BrokenPicture, EncodedPicture, ShardMember, read_picture

__all__ = [
    "BrokenPicture",
    "EncodedPicture",
    "Pair",
    "PairLoader",
    "PictureLoader",
    "ShardMember",
    "read_picture",
    "render_programs",
]
