# What this project uses of ml_collections. The package has no annotations, and from its code a type
# checker takes a field for any of what `ConfigDict` may store, None included.

from ml_collections import config_dict as config_dict
from ml_collections import config_flags as config_flags
from ml_collections.config_dict import ConfigDict as ConfigDict
