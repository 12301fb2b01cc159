"""Few-shot adaptation: the mixture of experts that answers a few examples best (Transformer², strategy C)."""

from peft_svf.dispatch.few_shot.adaptation import Adaptation
from peft_svf.dispatch.few_shot.cross_validation import CrossValidation, cross_validate
from peft_svf.dispatch.few_shot.dispatcher import FewShotDispatcher
from peft_svf.dispatch.few_shot.examples import AdaptationExamplesError, prompt_hash
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness, Optimizer, StartDistribution
from peft_svf.dispatch.few_shot.search import MixtureSearch, SearchResult, StopReason
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.dispatch.few_shot.search_state import SearchStateError


__all__ = [
    "Adaptation",
    "AdaptationExamplesError",
    "CrossValidation",
    "FewShotDispatcher",
    "Fitness",
    "MixtureSearch",
    "MixtureSpace",
    "Optimizer",
    "SearchResult",
    "SearchSettings",
    "SearchStateError",
    "StartDistribution",
    "StopReason",
    "cross_validate",
    "prompt_hash",
]
