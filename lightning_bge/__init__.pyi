from .advisor.audit.audit import audit as audit
from .data.datamodule import TextDataModule as TextDataModule
from .models.classifier import BGEClassifier as BGEClassifier

__version__: str
