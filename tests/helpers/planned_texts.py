"""The trials of a plan, without an experiment: of the objects that a function makes."""

from __future__ import annotations

from lightning_bge.advisor.plan.planned_trials import TextTrials
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.hpo.trial.text_setup import TextBuild
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics.config import MonitorConfig


class PlannedTexts(TextTrials):
    """As `TextTrials`, which are never compiled.

    Args:
        build: makes the objects of a trial.
        encoder: loads the encoders.
    """

    def __init__(self, build: TextBuild, encoder: EncoderCache | None = None) -> None:
        self.build, self.encoder = build, encoder or EncoderCache()
        self.monitor, self.compile = MonitorConfig("loss"), CompileConfig("never")
        self.without_packing = {"model.attention": "padded"}
