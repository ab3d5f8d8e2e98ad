"""The JSON file that `plan` and `audit` write where one is asked for."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from lightning_bge.cli.search_options import write_output


def test_the_file_follows_the_umask_and_its_folder_is_made(tmp_path: Path) -> None:
    path, before = tmp_path / "new" / "plan.json", os.umask(0o027)
    try:
        write_output(str(path), {"hours": 1})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert json.loads(path.read_text()) == {"schema_version": 1, "hours": 1}
    write_output(None, {})


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, found = tmp_path / "pipe", list[str]()
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    write_output(str(path), {"hours": 1})
    reader.join()
    assert json.loads(found[0])["hours"] == 1
    assert path.is_fifo()
