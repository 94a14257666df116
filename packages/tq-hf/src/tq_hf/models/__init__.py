"""The project's own trained language models, their held-out text and their quality measures.

Two small models are part of the package, so that the quality of a compressed cache can be measured
without any download: ``tiny`` (Llama architecture) and ``tiny-large-bias`` (Qwen2 architecture,
whose keys carry large biases on a few channels). Each folder has a model card.
"""

from tq_hf.models.loading import (
    HeldOutDocument,
    available_models,
    held_out_documents,
    held_out_text,
    load_model,
    model_path,
)
from tq_hf.models.quality import (
    Perplexity,
    RetrievalTask,
    perplexity,
    retrieval_accuracy,
    retrieval_tasks,
)

__all__ = [
    "HeldOutDocument",
    "Perplexity",
    "RetrievalTask",
    "available_models",
    "held_out_documents",
    "held_out_text",
    "load_model",
    "model_path",
    "perplexity",
    "retrieval_accuracy",
    "retrieval_tasks",
]
