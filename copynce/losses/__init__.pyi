from .copynce import CopyNCELoss as CopyNCELoss
from .copynce import copynce_loss as copynce_loss
from .descriptor import info_nce as info_nce
from .descriptor import koleo as koleo
from .settings import INITIAL_LOG_SCALE as INITIAL_LOG_SCALE
from .settings import CopyNCESettings as CopyNCESettings
