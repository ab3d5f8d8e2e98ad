from __future__ import annotations

from pathlib import Path

import pytest

from lightning_bge.cli.missing_files import check_files
from lightning_bge.errors import ConfigError, DataError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{train_file: {tmp_path}/gone.csv, test_file: null}}\n")
    return path


def test_a_data_file_in_a_yaml_file_is_checked(config: Path) -> None:
    with pytest.raises(DataError, match=r"data.train_file: .*gone.csv does not exist"):
        check_files(["-c", str(config)])


@pytest.mark.parametrize("flag", ["-c", "--config"])
def test_later_options_win_as_in_the_parser(config: Path, tmp_path: Path, flag: str) -> None:
    there = tmp_path / "there.csv"
    there.touch()
    check_files([flag, str(config), "--data.train_file", str(there)])
    check_files([f"{flag}={config}", f"--data.train_file={there}"])
    check_files([flag, str(config), "--data.train_file", "null"])
    with pytest.raises(DataError, match=r"gone\.csv"):
        check_files(["--data.train_file", str(there), flag, str(config)])


def test_help_and_print_config_need_no_data(config: Path) -> None:
    check_files(["-c", str(config), "--print_config"])
    check_files(["-c", str(config), "--help"])


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("data: [1, 2\n")
    with pytest.raises(ConfigError, match=r"broken.yaml is no YAML file"):
        check_files(["-c", str(path)])
    path.write_text("data: {}", encoding="utf-16")
    with pytest.raises(ConfigError, match=r"broken.yaml is not UTF-8 .*Save it as UTF-8"):
        check_files(["-c", str(path)])


@pytest.mark.parametrize("content", ["", "- 1\n", "data: 3\n"])
def test_what_the_parser_must_judge_is_left_to_it(tmp_path: Path, content: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    check_files(["-c", str(path), "--model.dropout", "-1"])


def test_no_arguments_are_left_to_the_parser() -> None:
    check_files([])


def test_a_file_name_that_yaml_takes_for_a_number_is_looked_for_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train_file: 1e3, test_file: ~}")
    with pytest.raises(DataError, match=r"data.train_file: 1e3 does not exist"):
        check_files(["-c", str(path)])


def test_a_name_in_brackets_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[1\]\.csv"):
        check_files(["--data.train_file", "[1].csv"])


def test_a_folder_is_no_yaml_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        check_files(["-c", str(tmp_path)])
