"""The vocabulary of a model file without its weights, for processes that tokenise for engines elsewhere.

Takes a fraction of a second and some megabytes, however large the file. The vocabulary stays loaded until the process ends:
there is one a process, and it is used until then.
"""

from __future__ import annotations

from pasture.core.errors import ModelError
from pasture.engine import bindings
from pasture.engine.bindings import lib
from pasture.engine.vocabulary import LlamaVocabulary


def load_vocabulary(path: str) -> LlamaVocabulary:
    """Raises ModelError with the library's reason where it cannot be read."""
    bindings.initialise()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    params.use_extra_bufts = False
    with bindings.library_log.errors() as reasons:
        handle = bindings.handle(lib.llama_model_load_from_file(path.encode(), params))
    if handle is None:
        raise ModelError(f"the vocabulary of {path} cannot be read: {'; '.join(map(str, reasons)) or 'no reason given'}")
    vocabulary = LlamaVocabulary(handle)
    if not vocabulary.n_tokens:
        raise ModelError(f"{path} has no vocabulary")
    return vocabulary
