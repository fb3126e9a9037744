"""Weights that are sent as they are."""


def test_null_passes_the_same_tensors_through(dense, scheme, weights_of):
    weights = weights_of(dense)
    encoded = scheme(None, dense).encode(weights.items())
    assert all(a is b for (_, a), b in zip(encoded, weights.values(), strict=True))
