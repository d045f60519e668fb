from .index.index import Index as Index
from .model import Model as Model
from .model import load_model as load_model

__version__: str
