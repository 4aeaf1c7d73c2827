"""Callbacks: evaluation, transcripts, export, throughput, progress, checkpoints and a guard against broken updates."""

from lit_agentrl.callbacks.budget_stop import BudgetStop
from lit_agentrl.callbacks.checkpoint import IterationCheckpoint
from lit_agentrl.callbacks.checkpoint_io import AtomicCheckpointIO
from lit_agentrl.callbacks.clock import UpdateClock
from lit_agentrl.callbacks.collection import CollectionMetrics
from lit_agentrl.callbacks.evaluation import Evaluation, read_evaluations
from lit_agentrl.callbacks.export import HFExport
from lit_agentrl.callbacks.guard import NonFiniteGuard
from lit_agentrl.callbacks.idle import IdleGuard
from lit_agentrl.callbacks.interrupt import stop_on_sigterm
from lit_agentrl.callbacks.progress import IterationProgress
from lit_agentrl.callbacks.ranks import RankLostError, RankWatch
from lit_agentrl.callbacks.run_log import RunLog
from lit_agentrl.callbacks.throughput import Throughput
from lit_agentrl.callbacks.transcripts import Transcripts

__all__ = [
    "AtomicCheckpointIO",
    "BudgetStop",
    "CollectionMetrics",
    "Evaluation",
    "HFExport",
    "IdleGuard",
    "IterationCheckpoint",
    "IterationProgress",
    "NonFiniteGuard",
    "RankLostError",
    "RankWatch",
    "RunLog",
    "Throughput",
    "Transcripts",
    "UpdateClock",
    "read_evaluations",
    "stop_on_sigterm",
]
