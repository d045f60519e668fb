"""The pixel executor: DALI pipelines that render edit programs for training, evaluation and people.

DALI itself is imported when a pipeline is built, not before.
"""

from dali_pipelines.loaders import CropLoader, Pair, PairLoader, PictureLoader, render_programs
from dali_pipelines.sources import BrokenPicture, EncodedPicture, ShardMember, read_picture
from dali_pipelines.views import Cut

__all__ = [
    "BrokenPicture",
    "CropLoader",
    "Cut",
    "EncodedPicture",
    "Pair",
    "PairLoader",
    "PictureLoader",
    "ShardMember",
    "read_picture",
    "render_programs",
]
