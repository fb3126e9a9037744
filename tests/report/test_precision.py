"""The curve of `verl describe --budget`, through the text in its SVG."""

from verl.report.precision import Point, draw_precision


def test_both_axes_and_every_kind_of_point_are_named():
    points = [Point(200 << 20, 5000.0, 0.05), Point(300 << 20, 4000.0, 0.002)]
    drawn = draw_precision(points, points, points[1:], 0.01)
    for text in (
        "weights in the engine, MiB",
        "tokens per second of one sequence",
        "KL divergence, nats per token",
        "budget",
        "predicted",
        "measured",
        "chosen",
        "200",
        "5,000",
    ):
        assert f">{text}<" in drawn.svg, text
    assert drawn.png().startswith(b"\x89PNG")
