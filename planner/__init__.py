"""Train a PyTorch model within a memory budget: plan what to recompute, apply it, measure it."""

from graph_capture.costs.profile import Profile

from .base.forward_slot import unplanned
from .block_plan import BlockPlan
from .blocks.applying import AppliedBlocks, applied_blocks
from .comparing.compare import compare
from .comparing.comparison import Comparison
from .comparing.files import ComparisonFileError
from .comparison_record import BudgetBound, ComparisonRow, MeasuredStep, RowOutcome
from .errors import (
    CallMismatchError,
    CaptureError,
    InfeasibleBudgetError,
    PlanError,
    PlanMismatchError,
    PlanWarning,
)
from .explaining.explanation import Explanation
from .explaining.holders import Holder, Why
from .explaining.more_memory import MoreMemory
from .explaining.recomputations import Recomputation
from .exporting.export import Export, ExportTarget
from .frontier import frontier
from .max_batch import max_batch
from .measuring.measure import Measurement, measure
from .measuring.validation import Figure, Validation
from .mesh.estimate_mesh import estimate_mesh
from .mesh.mesh_report import MeshEstimate, StageEstimate
from .optimize import optimize
from .pipeline import PipelinePlan, PlannedStage, Stage, plan_pipeline
from .plan import Plan
from .plan_record import PeakMemory
from .plan_set import PlanSet
from .running.attach import AppliedPlan, applied_plan
from .running.same_plan import check_same_plan
from .sizing.estimate import estimate
from .sizing.estimate_report import Estimate, EstimateRow
from .sizing.frontier_report import Frontier, FrontierPoint
from .sizing.max_batch_report import MaxBatch
from .versions import show_versions
from .watch import Watched, watch

__all__ = [
    "AppliedBlocks",
    "AppliedPlan",
    "BlockPlan",
    "BudgetBound",
    "CallMismatchError",
    "CaptureError",
    "Comparison",
    "ComparisonFileError",
    "ComparisonRow",
    "Estimate",
    "EstimateRow",
    "Explanation",
    "Export",
    "ExportTarget",
    "Figure",
    "Frontier",
    "FrontierPoint",
    "Holder",
    "InfeasibleBudgetError",
    "MaxBatch",
    "MeasuredStep",
    "Measurement",
    "MeshEstimate",
    "MoreMemory",
    "PeakMemory",
    "PipelinePlan",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "PlanSet",
    "PlanWarning",
    "PlannedStage",
    "Profile",
    "Recomputation",
    "RowOutcome",
    "Stage",
    "StageEstimate",
    "Validation",
    "Why",
    "Watched",
    "applied_blocks",
    "applied_plan",
    "check_same_plan",
    "compare",
    "estimate",
    "estimate_mesh",
    "frontier",
    "max_batch",
    "measure",
    "optimize",
    "plan_pipeline",
    "show_versions",
    "unplanned",
    "watch",
]
