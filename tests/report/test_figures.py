"""Content of the figures, read from their SVG, which keeps text as text."""

import re
from xml.etree import ElementTree

import pytest

from verl.report import panels
from verl.report.curves import draw_curves
from verl.report.layers import draw_depths, draw_layers, worst_layers
from verl.report.run import read_runs
from verl.report.stages import draw_stages
from verl.report.style import number, percent, short
from verl.report.timeline import draw_timeline

ALL = (*panels.LEARNING, *panels.RESPONSES, *panels.POLICY, *panels.MISMATCH, *panels.SPEED)
BY_KEY = {panel.key: panel for panel in ALL}
# Panels whose metrics the runs of these tests do not have.
NOT_IN_THESE_RUNS = {"critic_loss", "critic_explained", "importance_weights", "rejected", "staleness"}


def texts(drawn):
    return [element.text for element in ElementTree.fromstring(drawn.svg).iter() if element.tag.endswith("text")]


def curves_in(drawn, color):
    """Lines of a color, except the samples of the legend."""
    strokes = re.findall(r'<path d="([^"]*)"[^>]*style="[^"]*stroke: var\(([^)]*)\)', drawn.svg)
    return [path for path, stroke in strokes if stroke == color and path.count("L") > 3]


@pytest.fixture
def one(make_run):
    return read_runs([make_run("one")])


@pytest.fixture
def two(make_run):
    return read_runs([make_run("both/one"), make_run("both/two", level=0.1)])


def test_every_panel_has_units_on_both_axes(one):
    drawn = {panel.key: draw_curves(panel, one) for panel in (*ALL, *panels.validation(one))}
    assert {key for key, figure in drawn.items() if figure is None} == NOT_IN_THESE_RUNS
    for key, figure in drawn.items():
        if figure is not None:
            panel = BY_KEY.get(key) or panels.validation(one)[0]
            assert "training step" in texts(figure), key
            assert panel.unit in texts(figure), key


def test_panel_keys_are_unique():
    assert len(BY_KEY) == len(ALL)


def test_one_run_has_a_color_for_each_curve_and_the_limit_of_its_config(one):
    drawn = draw_curves(BY_KEY["response_length"], one)
    assert len(curves_in(drawn, "--c0")) == 1
    assert {"mean", "longest", "limit 64"} <= set(texts(drawn))


def test_two_runs_have_a_color_each_and_their_names_in_the_legend(two):
    drawn = draw_curves(BY_KEY["entropy"], two)
    assert {"one", "two"} <= set(texts(drawn))
    assert len(curves_in(drawn, "--c0")) == len(curves_in(drawn, "--c1")) == 1


def test_two_equal_curves_are_drawn_once(one):
    """Without a KL penalty the reward is the score."""
    assert "mean, minus the KL penalty" not in texts(draw_curves(BY_KEY["reward"], one))
    for data in one[0].records.values():
        data["critic/rewards/mean"] -= 0.1
    assert "mean, minus the KL penalty" in texts(draw_curves(BY_KEY["reward"], one))


def test_a_validation_panel_for_each_source(one):
    for data in one[0].records.values():
        data["val-core/math/acc/mean@1"] = 0.5
        data["val-core/math/acc/best@4/mean"] = 0.6
        data["val-core/math/acc/maj@4/mean"] = 0.55
        data["val-aux/math/acc/std@4"] = 0.1
    shown = {panel.title: list(panel.curves.values()) for panel in panels.validation(one)}
    assert shown == {
        "Validation: gym/spell": ["acc, mean of 4", "reward, mean of 4"],
        "Validation: math": ["acc, one sample", "acc, best of 4", "acc, majority of 4"],
    }


def test_names_from_a_run_are_not_changed(make_run):
    runs = read_runs([make_run("_a $x_1$ <b> & 'c'"), make_run("two")])
    assert "_a $x_1$ <b> & 'c'" in texts(draw_curves(BY_KEY["entropy"], runs))


def test_a_metric_of_only_nan_has_no_figure_and_gaps_stay_gaps(one):
    for step, data in one[0].records.items():
        data["actor/entropy"] = None
        data["actor/grad_norm"] = None if step == 10 else 1.0 + step
    assert draw_curves(BY_KEY["entropy"], one) is None
    (path,) = curves_in(draw_curves(BY_KEY["grad_norm"], one), "--c0")
    assert path.count("M") == 2


def test_a_run_of_one_step_has_every_figure(make_run):
    runs = read_runs([make_run("one", steps=1)])
    assert {panel.key for panel in ALL if draw_curves(panel, runs) is None} == NOT_IN_THESE_RUNS
    assert draw_stages(runs) is not None
    assert draw_layers(runs) is not None
    assert draw_depths(runs) is not None


def test_stages_show_their_seconds(one, two):
    assert {"generation (and rewards)", "1 s", "2 s", "3.5 s"} <= set(texts(draw_stages(one)))
    assert {"one", "two"} <= set(texts(draw_stages(two)))
    one[0].records.clear()
    assert draw_stages(one) is None


def test_worst_layers_are_counted(one):
    first, second = worst_layers(one[0])
    assert (first.layer, first.steps, first.first, first.last) == ("model.layers.0.self_attn.v_proj.weight", 19, 1, 20)
    assert (second.steps, second.first, second.largest) == (1, 7, pytest.approx(0.0327))
    assert {first.layer, second.layer} <= set(texts(draw_layers(one)))


def test_at_most_six_layers_are_named(one):
    for step, data in one[0].records.items():
        data["weight_update/max_quantization_error_layer"] = f"layer {step % 9}"
    shown = texts(draw_layers(one))
    assert sum(text.startswith("layer ") for text in shown if text) == 6
    assert "other layers" in shown


def test_every_layer_of_the_last_update_is_drawn(one, two):
    drawn = draw_depths(one)
    assert {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"} <= set(texts(drawn))
    assert "lm_head" not in texts(drawn), "it is not a decoder layer"
    (whole,), (broken,) = curves_in(drawn, "--c0"), curves_in(drawn, "--c1")
    assert (whole.count("M"), broken.count("M")) == (1, 2), "layer 4 has no v_proj"
    assert {"one", "two"} <= set(texts(draw_depths(two)))
    for data in one[0].records.values():
        del data["weight_update/quantization_errors"]
    assert draw_depths(one) is None


def test_a_timeline_has_a_lane_for_each_process(one):
    timeline = draw_timeline(one[0].timeline, "A step")
    assert (timeline.step, timeline.seconds) == (20, 3.5)
    assert timeline.engine == pytest.approx(0.6 / 3.5)
    assert timeline.train == pytest.approx(1.7 / 3.5)
    lanes = {"driver", "replica 0: requests", "replica 0 worker 0", "trainer rank 0", "reward worker 0"}
    assert lanes | {"update_actor", "at most 1", "engine generates"} <= set(texts(timeline.drawn))


@pytest.mark.parametrize("text", ["", "[\n", '[\n{"ph": "X"},\n', "[1]\n", '[\n"text",\n'])
def test_a_file_without_a_finished_step_is_an_error(tmp_path, text):
    path = tmp_path / "timeline.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"contains no finished step yet|is not a timeline of a run"):
        draw_timeline(path, "")


def test_the_same_run_gives_the_same_figures(one):
    assert draw_curves(BY_KEY["entropy"], one).svg == draw_curves(BY_KEY["entropy"], one).svg


def test_a_long_legend_does_not_shrink_the_curves(make_run, two):
    many = read_runs([make_run(f"many/a-run-with-a-long-name-{number}") for number in range(8)])

    def height(runs):
        return float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', draw_curves(BY_KEY["entropy"], runs).svg)[1])

    assert height(many) - height(two) == pytest.approx(2 * 0.18 * 72, abs=0.1)


def test_a_figure_can_be_a_png(one):
    assert draw_curves(BY_KEY["entropy"], one).png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.0007, "0.0007"), (1e-6, "1e-06"), (3449.3, "3,449"), (0.5, "0.5"), (2e9, "2e+09")],
)
def test_numbers_are_short(value, shown):
    assert number(value) == shown


def test_percentages_and_names_are_short():
    assert percent(0.0321) == "3.21 %"
    assert short("abcdefghij", 7) == "abc…hij"
