from .batches.config import BatchingConfig as BatchingConfig
from .datamodule import TextDataModule as TextDataModule
from .sample import write_sample as write_sample
from .tables.readers import TableConfig as TableConfig
from .tables.readers import read_table as read_table
from .tables.splits import SplitConfig as SplitConfig
from .tokens.cache_folder import clear_cache as clear_cache
