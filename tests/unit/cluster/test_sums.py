"""What an ingress says of a model that it has not loaded itself."""

from __future__ import annotations

from dataclasses import replace

from pasture.cluster.sums import as_loaded
from pasture.core.values import ModelInfo, Weights

MODEL = ModelInfo("m", "/m.gguf", "llama", "llama 1M", 1000, 2000, 260, 2, 4096, 16, shareable=True)


def test_a_model_is_described_as_its_replicas_have_loaded_it() -> None:
    written = replace(MODEL, weights=Weights.F16, weights_because="twice as quick", loaded_path="/copy", slowed_by=("no AMX",))
    other = replace(MODEL, loaded_path=MODEL.path, slowed_by=("no AMX", "old build"))
    assert as_loaded(MODEL, []) == MODEL
    assert as_loaded(MODEL, [written, written]) == written
    found = as_loaded(MODEL, [written, other])
    assert found.weights is Weights.F16
    assert found.weights_because == "twice as quick; not every replica computes with the same"
    assert found.slowed_by == ("no AMX", "old build")
