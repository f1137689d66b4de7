"""The model benchmarks refuse a time to whoever computes something else, and say why others are missing."""

import argparse

import pytest

from benchmarks.models import bench_train

pytest.importorskip("transformers")
OPTIONS = argparse.Namespace(batch=2, context=16, compile=False, mode="step", seconds=0.01, device="cpu")
RATES = {"float32_tflops": 1.0}


def test_training_rows(monkeypatch):
    real = bench_train.providers

    def with_a_wrong_one(folder, options):
        found = real(folder, options)

        def wrong():
            model, loss = found["fastlm"]()
            return model, lambda x, y: 1.001 * loss(x, y)

        return found | {"wrong": wrong}

    monkeypatch.setattr(bench_train, "providers", with_a_wrong_one)
    rows = {row["provider"]: row for row in bench_train.measure("gpt2-4x128", "fp32", OPTIONS, RATES)}
    assert rows["wrong"]["reason"].startswith("failed: AssertionError: wrong: loss")
    assert rows["transformers + liger"]["reason"].startswith("missing: No module named")
    for name in ("transformers", "fastlm", "transformers + nn.replace"):
        row = rows[name]
        assert row["kind"] == "train" and row["q1"] <= row["ms"] <= row["q3"]
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["ms"])
        assert 0 < row["mfu"] < 1 and row["ratio"] > 0
