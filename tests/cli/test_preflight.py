"""What a command will need is checked before a model is loaded: through the program, and from Python."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_bge import preflight as preflight_module
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.models import encoder
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.tuning import plan, tune
from tests.helpers.memory_location import Bucket

Run = Callable[..., tuple[int, str, str]]
SPACE = {"model.optimizer.lr": {"low": 1e-4, "high": 1e-2}}


@pytest.fixture(autouse=True)
def no_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded before all is checked."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    if "loads" not in request.fixturenames:
        monkeypatch.setattr(encoder.AutoModelForSequenceClassification, "from_pretrained", load)


@pytest.fixture
def loads() -> None:
    """A test whose command passes."""


def refused(run: Run, args: list[str], message: str) -> None:
    status, out, err = run(*args)
    assert status == 2, out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("lightning-bge: ")
    assert message in last
    assert "Traceback" not in err


def other_columns(path: Path) -> str:
    path.write_text("text,lbl\na,1\nb,0\n")
    return str(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("oss://bucket/run", "hpo.files: oss:// needs another package: Install ossfs"),
        ("s3://key:planted-secret@bucket/run", "hpo.files: expected a URL without a password, key or token"),
        ("s3:/bucket", "hpo.files: expected a folder, or a URL like s3://bucket/folder"),
        ("file", "hpo.files: "),
        ("bucket://read-only/run", "bucket://read-only/run/"),
        ("memory://bucket/run", "expected a location that outlives this process, got memory://bucket/run, its memory"),
    ],
)
def test_a_location_of_files_that_can_not_be_used_is_found_before_the_data_are_read(
    run: Run, search: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Bucket, "put_file", fail)
    monkeypatch.setattr(TextDataModule, "setup", fail)
    if files == "file":
        (tmp_path / "file").touch()
        files = str(tmp_path / "file")
    refused(run, [*search, "--hpo.files", files], message)
    assert "planted-secret" not in "".join(run(*search, "--hpo.files", files)[1:])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("command", ["fit", "hpo"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,criterion,post_id,lbl\na,b,1,1\n", "no column 'label'"),
        ("text,criterion,post_id,label\na,b,1,1\nc,d,2,maybe\n", "label 'maybe'"),
        ("text,criterion,post_id,label\na,,1,1\n", "'criterion'"),
    ],
    ids=["column", "label", "text"],
)
def test_a_wrong_test_file_is_found_before_training(
    run: Run,
    search: list[str],
    tmp_path: Path,
    command: str,
    content: str,
    message: str,
) -> None:
    path = tmp_path / "test.csv"
    path.write_text(content)
    args = search if command == "hpo" else ["fit", *search[1 : search.index("--data.split.folds")]]
    refused(run, [*args, "--data.test_file", str(path)], message)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".", "output: expected a file, got the folder '.'"),
        ("TMP/file/x.csv", "file is a file, where a folder is needed"),
        ("SAMPLE/test.csv", "is what data.predict_file reads, and would be replaced"),
        ("TMP/new/", "output: expected a file"),
    ],
)
def test_predict_checks_its_output_first(
    run: Run,
    sample: Path,
    tmp_path: Path,
    output: str,
    message: str,
) -> None:
    (tmp_path / "file").touch()
    output = output.replace("TMP", str(tmp_path)).replace("SAMPLE", str(sample))
    args = ["predict", "--model.name_or_path", str(sample / "model"), "--data.predict_file", str(sample / "test.csv")]
    refused(run, [*args, "--output", output], message)


@pytest.mark.parametrize("command", ["plan", "audit"])
def test_the_json_of_plan_and_audit_is_checked_first(
    run: Run,
    search: list[str],
    tmp_path: Path,
    command: str,
) -> None:
    refused(run, [command, *search[1:], "--json", str(tmp_path)], "json: expected a file, got the folder")


@pytest.mark.parametrize("command", ["fit", "hpo"])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("study", "study is a file, where a folder is needed"),
        ("study/model/notes.txt", "model exists and is no exported model"),
        ("study/checkpoints", "checkpoints is a file, where a folder is needed"),
        ("study/config.yaml/x", "config.yaml is a folder, where a file is needed"),
    ],
)
def test_a_run_folder_that_can_not_serve(
    run: Run,
    search: list[str],
    tmp_path: Path,
    command: str,
    made: str,
    message: str,
) -> None:
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("x")
    args = search if command == "hpo" else ["fit", *search[1 : search.index("--data.split.folds")]]
    refused(run, args, message)


def test_a_model_that_the_run_would_replace(run: Run, options: list[str], sample: Path, tmp_path: Path) -> None:
    shutil.copytree(sample / "model", tmp_path / "study" / "model")
    (tmp_path / "study" / "model" / "lightning_bge.json").write_text("{}")
    refused(run, ["fit", *options, "--model.name_or_path", str(tmp_path / "study" / "model")], "would replace")


def test_a_data_file_that_the_run_would_replace(run: Run, options: list[str], sample: Path, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    shutil.copy(sample / "train.csv", tmp_path / "study" / "validation.csv")
    data = str(tmp_path / "study" / "validation.csv")
    refused(run, ["fit", *options, "--data.train_file", data], "is what data.train_file reads")


@pytest.mark.parametrize("command", ["fit", "hpo", "plan", "audit"])
@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
def test_a_broken_model_is_found_before_the_data_are_read(
    run: Run,
    search: list[str],
    sample: Path,
    tmp_path: Path,
    command: str,
    broken: str,
) -> None:
    shutil.copytree(sample / "model", tmp_path / "model")
    (tmp_path / "model" / broken).unlink()
    args = search[1:] if command != "fit" else search[1 : search.index("--data.split.folds")]
    args = [command, *args, "--model.name_or_path", str(tmp_path / "model")]
    refused(run, args, "is not a folder that transformers loads as a text classifier")
    assert not (tmp_path / "study").exists()
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_found_before_training(
    run: Run,
    search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 100_000  # three checkpoints of this model need 250 KiB, and two with the model 200 KiB
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    refused(run, search, f"two checkpoints of a trial (86.1 KiB each) and 1 exported model need 200.8 KiB, but "
                         f"97.7 KiB are free in {tmp_path}")  # fmt: skip
    fit = ["fit", *search[1 : search.index("--data.split.folds")]]
    refused(run, fit, "three checkpoints (86.1 KiB each) and the exported model need 286.9 KiB, but 97.7 KiB are free")
    assert not (tmp_path / "study").exists()
    # what the run itself holds is replaced
    (tmp_path / "study" / "checkpoints").mkdir(parents=True)
    (tmp_path / "study" / "checkpoints" / "last.ckpt").write_bytes(b"0" * 50_000)
    refused(run, fit, "but 146.5 KiB are free")
    # checkpoints elsewhere: one at a time in a temporary file, or two in the other folder
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=80_000))
    text = "TMPDIR: checkpoints of trials, one at a time, need 86.1 KiB, but 78.1 KiB are free"
    refused(run, [*search, "--hpo.files", "bucket://bucket/run"], text)
    text = f"hpo.files: two checkpoints of a trial (86.1 KiB each) need 172.1 KiB, but 78.1 KiB are free in {tmp_path}"
    refused(run, [*search, "--hpo.files", str(tmp_path / "other")], text)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_epochs", "0"], "trainer.max_epochs: expected 1 or more, got 0: nothing would be trained"),
        (["--trainer.max_steps", "0"], "trainer.max_steps: expected 1 or more, got 0"),
        (["--trainer.check_val_every_n_epoch", "0"], "trainer.check_val_every_n_epoch: expected 1 or more"),
        (["--model.loss.name", "mse"], "model.loss.name: a binary task takes bce or focal, got mse"),
        (["--data.cache_dir", __file__], "is a file, where a folder is needed"),
        (["--trainer.check_val_every_n_epoch", "3"], "expected at most trainer.max_epochs=2, got 3"),
        (["--trainer.val_check_interval", "1000"], "expected at most the 3 steps of an epoch, got 1000"),
        (["--trainer.barebones", "true"], "trainer.barebones: expected false"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_with_which_nothing_would_be_trained_or_validated(
    run: Run,
    options: list[str],
    tmp_path: Path,
    args: list[str],
    message: str,
) -> None:
    refused(run, ["fit", *options, *args], message)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("fit", "train"),
        ("hpo", "train"),
        ("plan", "train"),
        ("validate", "train"),
        ("test", "test"),
        ("predict", "predict"),
    ],
)
def test_a_command_without_its_file(run: Run, command: str, option: str) -> None:
    refused(run, [command], f"data.{option}_file: {command} needs a file, got null")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ('{"trainer.max_epochs": {"choices": [0, 2]}}', "hpo.space.trainer.max_epochs: expected 1 or more, got 0"),
        ('{"model.name_or_path": {"choices": ["./gone", "./none"]}}', "the folder ./gone does not exist"),
    ],
)
def test_a_space_of_what_can_not_be_trained(
    run: Run, search: list[str], tmp_path: Path, space: str, message: str
) -> None:
    refused(run, [*search, "--hpo.space", space], message)
    assert not (tmp_path / "study").exists()


def test_a_pruner_that_could_never_prune_leaves_no_folder(run: Run, search: list[str], tmp_path: Path) -> None:
    refused(run, [*search, "--trainer.max_epochs", "1", "--data.split.folds", "1"], "could never prune")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("limit", [["--trainer.fast_dev_run", "true"], ["--trainer.limit_predict_batches", "1"]])
def test_predictions_of_a_part_of_the_rows_are_refused(run: Run, sample: Path, limit: list[str]) -> None:
    args = ["predict", "--model.name_or_path", str(sample / "model"), "--data.predict_file", str(sample / "test.csv")]
    refused(run, [*args, *limit], "predict writes a row for each row of data.predict_file")


@pytest.mark.parametrize("command", ["hpo", "plan"])
def test_a_study_of_parts_of_the_data_is_refused(run: Run, search: list[str], command: str) -> None:
    refused(run, [command, *search[1:], "--trainer.limit_train_batches", "2"], "lower hpo.n_trials and set data.table")


def test_classes_without_rows_are_named(run: Run, options: list[str], tmp_path: Path, loads: None) -> None:
    def write(name: str, labels: list[str]) -> str:
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows(
                [["text", "label"], *([f"{label} {n}", label] for n, label in enumerate(labels))]
            )
        return str(tmp_path / name)

    files = ["--data.train_file", write("a.csv", ["a", "b"] * 10), "--data.val_file", write("b.csv", ["a", "a", "b"])]
    common = ["--data.text_columns", "text", "--data.group_column", "null", "--trainer.max_epochs", "1"]
    common += ["--model.task", "multiclass", "--monitor.metric", "accuracy", "--data.table.labels", "[a, b, c]"]
    status, _, err = run("fit", *options, *files, *common)
    assert status == 0, err
    assert "data.val_file has no row of these classes, so that its scores say nothing of them: c" in err


def test_a_metric_that_can_not_be_computed_on_a_file_is_found_first(
    run: Run, search: list[str], tmp_path: Path
) -> None:
    """Its rows are all of one class."""
    path = tmp_path / "one.csv"
    path.write_text("text,criterion,post_id,label\na,b,1,0\nc,d,2,0\n")
    for command, option in (("fit", "val"), ("fit", "test"), ("hpo", "test")):
        args = search[1:] if command == "hpo" else search[1 : search.index("--data.split.folds")]
        message = f"data.{option}_file: the metric auroc can't be computed on these 2 rows"
        refused(run, [command, *args, "--monitor.metric", "auroc", f"--data.{option}_file", str(path)], message)
    assert not (tmp_path / "study").exists()


def test_a_metric_that_can_not_be_computed_on_a_fold_is_found_first(
    run: Run, search: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "rare.csv"
    rows = "".join(f"text {n},{'a|b' if n == 1 else 'a' if n % 2 else ''}\n" for n in range(40))
    path.write_text(f"text,label\n{rows}")
    labels = ["--model.task", "multilabel", "--monitor.metric", "auroc", "--data.text_columns", "text"]
    args = [*search, "--data.train_file", str(path), "--data.group_column", "null", *labels]
    refused(run, args, "the metric auroc can't be computed on these 20 rows, as no row is with the label 'b'")


# ---------------------------------------------------------------------- callbacks

CALLBACKS = """
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val_loss, mode: max}
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val_f1, mode: max}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: lightning.pytorch.callbacks.Timer
"""


def test_callbacks_that_can_not_serve_are_left_out(
    run: Run,
    search: list[str],
    sample: Path,
    tmp_path: Path,
    loads: None,
) -> None:
    (tmp_path / "callbacks.yaml").write_text(CALLBACKS)
    config = ["-c", str(tmp_path / "callbacks.yaml"), "--trainer.precision", "32-true"]
    study = [*search, *config, "--hpo.n_trials", "1", "--trainer.max_epochs", "1", "--hpo.baseline", "false"]
    status, _, err = run(*study)
    assert status == 0, err
    for name in ("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor"):
        assert err.count(f"trainer.callbacks: {name} is left out, as hpo has no logger") == 1
    assert "Timer is left out" not in err
    # `fit` has them again
    assert "EarlyStopping" in (tmp_path / "study" / "best.yaml").read_text()

    model = ["--model.name_or_path", str(tmp_path / "study" / "model"), "--data.cache_dir", str(tmp_path / "cache")]
    for command in (
        [
            "predict",
            "--data.predict_file",
            str(sample / "test.csv"),
            "--output",
            str(tmp_path / "new" / "x" / "out.csv"),
        ],
        ["test", "--data.test_file", str(sample / "test.csv")],
    ):
        status, _, err = run(*command, *model, *config)
        assert status == 0, err
        for name in ("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor", "Timer"):
            assert err.count(f"trainer.callbacks: {name} is left out, as {command[0]} trains nothing") == 1
    assert (tmp_path / "new" / "x" / "out.csv").is_file()


# ---------------------------------------------------------------------- from Python


def test_tune_and_plan_check_the_same(sample: Path, tmp_path: Path) -> None:
    model = BGEClassifier(str(sample / "model"))
    files = {"train_file": str(sample / "train.csv"), "cache_dir": str(tmp_path / "cache")}
    data = TextDataModule(text_columns=("text", "criterion"), **files)
    wrong = TextDataModule(text_columns=("text", "criterion"), test_file=other_columns(tmp_path / "t.csv"), **files)
    with pytest.raises(DataError, match="no column"):
        tune(model, wrong, SPACE, run_dir=tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="where a folder is needed"):
        tune(model, data, SPACE, run_dir=tmp_path / "file" / "run")
    for call in (tune, plan):
        with pytest.raises(ConfigError, match="a study needs whole epochs"):
            call(model, data, SPACE, run_dir=tmp_path / "run", trainer={"fast_dev_run": True})
    assert not (tmp_path / "run").exists()
