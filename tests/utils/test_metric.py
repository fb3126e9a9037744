"""Reduction of metric lists by the names of the metrics."""

import pytest

from verl.utils.metric import reduce_metrics


def test_names_choose_the_reduction():
    metrics = {"loss": [1.0, 3.0], "length/max": [2, 5], "length/min": [2, 5], "one": 4}
    assert reduce_metrics(metrics) == {"loss": 2.0, "length/max": 5.0, "length/min": 2.0, "one": 4.0}
    with pytest.raises(ValueError, match="'loss' has no value"):
        reduce_metrics({"loss": []})
