from .advisor.audit.audit import audit as audit
from .data.datamodule import TextDataModule as TextDataModule
from .models.classifier import BGEClassifier as BGEClassifier
from .tuning import plan as plan
from .tuning import tune as tune

__version__: str
