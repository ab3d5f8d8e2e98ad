"""Are we maxed out? Measures, audit, cost model, plan, report."""

from lightning_bge.advisor.audit import Audit, AuditConfig, audit
from lightning_bge.advisor.audit_page import audit_section, write_audit_page
from lightning_bge.advisor.audit_words import describe_audit
from lightning_bge.advisor.claims import Claims
from lightning_bge.advisor.measure import Pace, measure_pace
from lightning_bge.advisor.own import OwnRun, audit_own
from lightning_bge.advisor.page import Section, write_page
from lightning_bge.advisor.plan import Known, Plan, PlanConfig, Search, load_calibration, make_plan
from lightning_bge.advisor.plan_words import describe_plan
from lightning_bge.advisor.predict import seconds_of
from lightning_bge.advisor.report import write_report
from lightning_bge.advisor.rows import Gain, Row
from lightning_bge.advisor.rows_search import objective_rows
from lightning_bge.advisor.status import describe_status, watch_status

__all__ = [
    "Audit",
    "AuditConfig",
    "Claims",
    "Gain",
    "Known",
    "OwnRun",
    "Pace",
    "Plan",
    "PlanConfig",
    "Row",
    "Search",
    "Section",
    "audit",
    "audit_own",
    "audit_section",
    "describe_audit",
    "describe_plan",
    "describe_status",
    "load_calibration",
    "make_plan",
    "measure_pace",
    "objective_rows",
    "seconds_of",
    "watch_status",
    "write_audit_page",
    "write_page",
    "write_report",
]
