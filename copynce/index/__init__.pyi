from .adding import Added as Added
from .index import Index as Index
from .index import Match as Match
from .searching import Neighbours as Neighbours
from .settings import IndexConfig as IndexConfig
