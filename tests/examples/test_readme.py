"""The program of the README runs as it stands, but for the names of model and file."""

import re
from pathlib import Path

import pytest

from lightning_bge import BGEClassifier
from lightning_bge.models.output.inference import TextPredictions
from tests.examples.test_examples import pytestmark, sample
from tests.helpers.paths import ROOT

__all__ = ["pytestmark", "sample"]


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*:UserWarning")
def test_the_program_of_the_readme(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text().split("## From Python")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    program = block[1]
    for old, new in (("BAAI/bge-small-en-v1.5", sample / "model"), ("pairs.csv", sample / "train.csv")):
        assert program.count(f'"{old}"') == 1
        program = program.replace(f'"{old}"', repr(str(new)))
    program = program.replace("max_epochs=3", "max_epochs=1, accelerator='cpu'")
    lines = program.strip().splitlines()
    assert lines[-1].startswith("model.predict(")
    lines[-1] = f"found = {lines[-1]}"
    names: dict[str, object] = {}
    exec("\n".join(lines), names)
    assert isinstance(names["model"], BGEClassifier)
    assert isinstance(found := names["found"], TextPredictions)
    assert len(found.scores) == 1
