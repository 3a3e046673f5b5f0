"""What a batch's loss is: one objective for each stage."""

from modern_llm.objectives.base import Objective, Outcome, Term, Unit
from modern_llm.objectives.language_modeling import LanguageModelingObjective
from modern_llm.objectives.preference import PreferenceObjective

__all__ = ["LanguageModelingObjective", "Objective", "Outcome", "PreferenceObjective", "Term", "Unit"]
