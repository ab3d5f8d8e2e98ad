"""Writes `report.html` into a run folder: the results, how they came about, and how to repeat the run."""

import shlex
from pathlib import Path

import yaml

from lightning_bge.advisor.audit.output import audit_section
from lightning_bge.advisor.html.page import Section, code, paragraph, table, write_page
from lightning_bge.advisor.report.format import describe_state, describe_study
from lightning_bge.advisor.report.run_data import RunData, read_run


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a study or of a training run, finished or not.

    The page is self-contained. It shows no texts of the data, and no passwords or tokens. No other file of the folder
    is changed, and the run may still be in progress.

    Args:
        run_dir: the run's folder.

    Returns:
        The path of the report.

    Raises:
        ConfigError: it is not a run folder.
        StudyError: its journal is corrupt.
    """
    # imported here, as plotly takes a quarter of a second, and a long run needs it only at its end
    from lightning_bge.advisor.report.fit_sections import fit_sections
    from lightning_bge.advisor.report.study_sections import study_sections

    run = read_run(run_dir)
    sections = [*(study_sections(run) if run.is_study else fit_sections(run)), _scorecard(run)]
    if run.best is not None:
        text = "<p>The complete configuration, for <code>lightning-bge fit -c best.yaml</code>:</p>"
        sections.append(Section("Best hyperparameters", text + code(run.best, "winner")))
    sections.append(Section("How to repeat this run", _how_to_repeat(run)))
    if run.config:
        config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        sections.append(Section("Configuration", code(config, "config")))
    lead = paragraph(f"{'study' if run.is_study else 'training run'}: {describe_state(run)}", "muted")
    if run.history is not None:
        lead += paragraph(describe_study(run.history), "muted")
    return write_page(run_dir / "report.html", run_dir.resolve().name, sections, lead)


def _scorecard(run: RunData) -> Section:
    if run.audit is not None:
        return Section("Scorecard", audit_section(run.audit))
    command = f"lightning-bge audit -c {shlex.quote(str(run.path / 'config.yaml'))}"
    text = "This run has no audit. The following command measures which optimizations are in effect, and what could "
    text += "still be gained."
    return Section("Scorecard", paragraph(text) + code(command, "audit"))


def _how_to_repeat(run: RunData) -> str:
    if not run.calls:
        return paragraph("The folder has no run.json, so the command, versions and seed are not known.")
    last = run.calls[-1]
    program, *arguments = last["command"]
    command = shlex.join([Path(program).name, *arguments])
    rows = [
        ("started", str(last.get("started"))),
        ("folder", str(last.get("folder"))),
        ("seed", str(last.get("seed"))),
        ("data hash", str(last.get("data_hash"))),
        ("model", str(last.get("model"))),
        ("model revision", str(last.get("model_revision") or "a local folder, or not known")),
        ("git commit", str(last.get("git_commit") or "not a git checkout")),
        ("Python", str(last.get("python"))),
        ("platform", str(last.get("platform"))),
        *((name, str(version)) for name, version in (last.get("versions") or {}).items()),
    ]
    text = f"The run was started {len(run.calls)} times; the last time:" if len(run.calls) > 1 else "Started once:"
    return paragraph(text) + code(command, "command") + table(["what", "value"], rows)
