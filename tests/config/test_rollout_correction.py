"""`resolve`: presets, thresholds, and errors."""

import dataclasses
import subprocess
import sys

import pytest

from verl.config import ConfigError, RolloutCorrectionConfig, load_config
from verl.config.rollout_correction import PRESETS, RS_TERMS, Band, Correction, Rejection, resolve

GEO = (Rejection("seq_mean_k1", Band(0.999, 1.001)),)
K3 = (Rejection("seq_mean_k3", Band(0.0, 0.01)),)
TIS, ICEPOP = (Band(0.5, 2.0), False), (Band(0.5, 5.0), True)
PG, CLIP = {"bypass_mode": True, "loss_type": "reinforce"}, {"bypass_mode": True, "loss_type": "ppo_clip"}
EXPECTED = {
    "disabled": Correction(),
    "decoupled_token_is": Correction("token", *TIS),
    "decoupled_seq_is": Correction("sequence", *TIS),
    "decoupled_token_icepop": Correction("token", *ICEPOP),
    "decoupled_seq_is_rs": Correction("sequence", *TIS, rejections=(Rejection("seq_sum_k1", Band(0.5, 2.0)),)),
    "decoupled_geo_rs": Correction(rejections=GEO),
    "decoupled_geo_rs_seq_tis": Correction("sequence", *TIS, rejections=GEO),
    "decoupled_geo_rs_token_tis": Correction("token", *TIS, rejections=GEO),
    "decoupled_k3_rs": Correction(rejections=K3),
    "decoupled_k3_rs_seq_tis": Correction("sequence", *TIS, rejections=K3),
    "decoupled_k3_rs_token_tis": Correction("token", *TIS, rejections=K3),
    "bypass_ppo_clip": Correction(**CLIP),
    "bypass_ppo_clip_geo_rs": Correction(rejections=GEO, **CLIP),
    "bypass_ppo_clip_k3_rs": Correction(rejections=K3, **CLIP),
    "bypass_pg_is": Correction("sequence", *TIS, **PG),
    "bypass_pg_token_icepop": Correction("token", *ICEPOP, **PG),
    "bypass_pg_geo_rs": Correction(rejections=GEO, **PG),
    "bypass_pg_geo_rs_seq_tis": Correction("sequence", *TIS, rejections=GEO, **PG),
    "bypass_pg_geo_rs_token_tis": Correction("token", *TIS, rejections=GEO, **PG),
}


def resolved(**keys):
    return resolve(RolloutCorrectionConfig(**keys))


def resolve_error(**keys):
    with pytest.raises(ValueError) as caught:
        resolved(**keys)
    assert isinstance(caught.value, ConfigError) and len(caught.value.problems) == 1, caught.value.problems
    return str(caught.value)


@pytest.mark.parametrize("preset", [*PRESETS, *EXPECTED])
def test_presets(preset):
    assert resolved(preset=preset) == EXPECTED[preset]


def test_defaults_correct_nothing():
    correction = resolved()
    assert correction == Correction() and not correction.active and not correction.bypass_mode


def test_key_may_equal_the_preset():
    expected = EXPECTED["decoupled_token_icepop"]
    assert resolved(preset="decoupled_token_icepop", rollout_is="token", rollout_is_threshold="0.5_5") == expected
    assert resolved(preset="decoupled_k3_rs", rollout_rs_threshold="1e-2").rejections == K3


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("rollout_is", "token", "sequence"),
        ("rollout_is_threshold", 3.0, "2.0"),
        ("rollout_is_threshold", "0.5_2.0", "2.0"),
        ("rollout_is_batch_normalize", True, "False"),
        ("rollout_rs", "token_k1", "seq_sum_k1"),
        ("rollout_rs_threshold", "0.5_3.0", "0.5_2.0"),
        ("bypass_mode", True, "False"),
        ("loss_type", "reinforce", "ppo_clip"),
    ],
)
def test_key_contradicts_the_preset(key, value, says):
    text = resolve_error(preset="decoupled_seq_is_rs", **{key: value})
    assert text.startswith(f"algorithm.rollout_correction.{key}={value}: ")
    assert f"algorithm.rollout_correction.preset=decoupled_seq_is_rs sets {says}; leave one" in text


def test_pooling_and_estimator_of_terms():
    parts = {
        "token_k1": (None, "k1"),
        "seq_sum_k2": ("sum", "k2"),
        "seq_mean_k3": ("mean", "k3"),
        "seq_max_k3": ("max", "k3"),
        "binary_kl": (None, "binary_kl"),
    }
    for term, (pooling, estimator) in parts.items():
        rejection = Rejection(term, Band(0.5, 2.0))
        assert (rejection.pooling, rejection.estimator) == (pooling, estimator)
    assert len(RS_TERMS) == len(set(RS_TERMS)) == 12


@pytest.mark.parametrize(
    ("keys", "rejections"),
    [
        (("token_k1", 4), [("token_k1", 0.25, 4.0)]),
        (("token_k1", "4"), [("token_k1", 0.25, 4.0)]),
        (("seq_mean_k1", "0.9_1.5"), [("seq_mean_k1", 0.9, 1.5)]),
        (("seq_max_k2", 2.5), [("seq_max_k2", 0.0, 2.5)]),
        (("token_k1,seq_max_k2", "0.6_1.6,2.5"), [("token_k1", 0.6, 1.6), ("seq_max_k2", 0.0, 2.5)]),
        ((" token_k1 , seq_sum_k3,", " 2 , 0.1 "), [("token_k1", 0.5, 2.0), ("seq_sum_k3", 0.0, 0.1)]),
        (("token_k1,seq_sum_k3", 2.0), [("token_k1", 0.5, 2.0), ("seq_sum_k3", 0.0, 2.0)]),
        (("token_k3,token_k3", 0.1), [("token_k3", 0.0, 0.1)]),
    ],
)
def test_thresholds_of_terms(keys, rejections):
    found = resolved(rollout_rs=keys[0], rollout_rs_threshold=keys[1]).rejections
    assert [(r.term, r.band.lo, r.band.hi) for r in found] == rejections


@pytest.mark.parametrize(
    ("value", "band", "zero"),
    [
        (1, (1, 1), False),
        (4.0, (0.25, 4.0), False),
        ("4", (0.25, 4.0), False),
        ("0.5_5", (0.5, 5.0), True),
        (" 0.5_5.0 ", (0.5, 5.0), True),
        ("1e-1_1e1", (0.1, 10.0), True),
    ],
)
def test_thresholds_of_weights(value, band, zero):
    correction = resolved(rollout_is="token", rollout_is_threshold=value)
    assert (correction.rollout_is_band, correction.rollout_is_zero) == (Band(*band), zero)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("5.0_0.5", ("wrong order", "use 0.5_5.0")),
        (-2.0, ("above 0",)),
        (0, ("above 0",)),
        ("-0.5_5.0", ("above 0",)),
        ("0_2", ("above 0",)),
        ("two", ("must be a number or a band",)),
        ("", ("must be a number or a band",)),
        ("0.5_", ("must be a number or a band",)),
        ("0.5_2.0_3.0", ("must be a number or a band",)),
        ("0.5_2.0,3.0", ("must be a number or a band",)),
        ("nan", ("must be a number or a band",)),
        ("0.5_inf", ("must be a number or a band",)),
        ("True", ("must be a number or a band",)),
        (0.5, ("at least 1", "use 2.0", "0.5_5.0")),
        ("2.0_5.0", ("must contain 1",)),
        ("1.0_1.0", ("must contain 1",)),
    ],
)
def test_invalid_thresholds_of_weights(value, words):
    text = resolve_error(rollout_is="token", rollout_is_threshold=value)
    assert text.startswith(f"algorithm.rollout_correction.rollout_is_threshold={value}: ")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("terms", "value", "words"),
    [
        ("token_k1", "2.0_0.5", ("2.0_0.5 for token_k1", "wrong order", "use 0.5_2.0")),
        ("token_k1", -1.5, ("above 0",)),
        ("token_k1", 0.5, ("above 1", "from 1/x to x", "0.5_5.0")),
        ("seq_sum_k1", 1.0, ("above 1",)),
        ("seq_mean_k1", "1.1_1.2", ("must contain 1",)),
        ("seq_mean_k3", "0.001_0.01", ("two bounds", "one number")),
        ("seq_mean_k3", "-0.01", ("above 0",)),
        ("seq_mean_k3", "small", ("must be a number or a band",)),
        ("token_k1,seq_mean_k3", "0.5_2.0,x", ("x for seq_mean_k3", "must be a number or a band")),
        ("token_k1,seq_mean_k3", "0.5_2.0,0.1,0.1", ("3 thresholds for 2 terms", "one for each, or one for all")),
        ("token_k1", "0.5_2.0,0.1", ("2 thresholds for 1 terms",)),
        ("token_k1,seq_mean_k3", "0.5_2.0", ("0.5_2.0 for seq_mean_k3", "two bounds")),
        ("token_k1", "", ("must be a number or a band",)),
    ],
)
def test_invalid_thresholds_of_terms(terms, value, words):
    text = resolve_error(rollout_rs=terms, rollout_rs_threshold=value)
    assert text.startswith(f"algorithm.rollout_correction.rollout_rs_threshold={value}: ")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("keys", "start", "words"),
    [
        (
            {"preset": "decoupled_geo"},
            "preset=decoupled_geo",
            ("did you mean decoupled_geo_rs?", "bypass_pg_is", "null"),
        ),
        ({"rollout_is": "tokens"}, "rollout_is=tokens", ("did you mean token?", "token, sequence, null")),
        ({"loss_type": "ppo"}, "loss_type=ppo", ("ppo_clip, reinforce",)),
        (
            {"rollout_rs": "token_k1,seq_men_k3", "rollout_rs_threshold": 2.0},
            "rollout_rs=token_k1,seq_men_k3",
            ("seq_men_k3 is unknown", "did you mean seq_mean_k3?", "seq_max_k2"),
        ),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 2.0}, "rollout_rs=seq_max_k1", ("is unknown",)),
        ({"rollout_rs": "", "rollout_rs_threshold": 2.0}, "rollout_rs=", ("is unknown",)),
        ({"rollout_rs": "token_k1"}, "rollout_rs_threshold is not set", ("rollout_rs=token_k1",)),
        (
            {"rollout_rs_threshold": 2.0},
            "rollout_rs_threshold=2.0",
            ("requires algorithm.rollout_correction.rollout_rs", "set algorithm.rollout_correction"),
        ),
    ],
)
def test_invalid_names(keys, start, words):
    text = resolve_error(**keys)
    assert text.startswith(f"algorithm.rollout_correction.{start}")
    assert all(word in text for word in words), text


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        resolved(rollout_is="x", rollout_is_threshold=-1, rollout_rs="y", rollout_rs_threshold=2.0, loss_type="z")
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("preset", "key", "value", "says"),
    [
        ("bypass_pg_is", "bypass_mode", "False", "True"),
        ("bypass_pg_is", "loss_type", "ppo_clip", "reinforce"),
        ("bypass_pg_is", "rollout_is", "null", "sequence"),
        ("decoupled_geo_rs", "rollout_rs", "null", "seq_mean_k1"),
        ("decoupled_token_icepop", "rollout_is_threshold", "2.0", "0.5_5.0"),
    ],
)
def test_default_on_the_command_line_contradicts_the_preset(preset, key, value, says):
    start = "algorithm.rollout_correction."
    for given in (
        [f"{start}preset={preset}", f"{start}{key}={value}"],
        [f"algorithm.rollout_correction={{preset: {preset}, {key}: {value}}}"],
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(given)
        expected = f"{start}{key}={value}: {start}preset={preset} sets {says}; leave one of the two out"
        assert caught.value.problems == (expected,)
    same = load_config([f"{start}preset={preset}", f"{start}{key}={says!r}"]).algorithm.rollout_correction
    assert resolve(same) == EXPECTED[preset]


@pytest.mark.parametrize(
    ("earlier", "now"), [("geometric", "seq_mean_k1"), ("sequence", "seq_sum_k1"), ("token", "token_k1")]
)
def test_old_names_of_terms_suggest_the_current_names(earlier, now):
    assert f"did you mean {now}?" in resolve_error(rollout_rs=earlier, rollout_rs_threshold=2.0)


def test_bands_on_the_command_line():
    def correction(*overrides):
        config = load_config([f"algorithm.rollout_correction.{override}" for override in overrides])
        return resolve(config.algorithm.rollout_correction)

    assert correction("rollout_is=token", "rollout_is_threshold=0.5_5.0").rollout_is_band == Band(0.5, 5.0)
    assert correction("rollout_rs=seq_mean_k1", "rollout_rs_threshold=0.999_1.001").rejections == GEO
    two = correction("rollout_rs='token_k1,seq_max_k2'", "rollout_rs_threshold='0.6_1.6,2.5'").rejections
    assert two == (Rejection("token_k1", Band(0.6, 1.6)), Rejection("seq_max_k2", Band(0.0, 2.5)))
    assert correction("preset=bypass_pg_is") == EXPECTED["bypass_pg_is"]
    # YAML reads these as 0.55 and 50.5.
    assert correction("rollout_is=token", "rollout_is_threshold=0.5_5").rollout_is_band == Band(0.5, 5.0)
    with pytest.raises(ConfigError, match=r"5_0\.5: has its bounds in the wrong order; use 0\.5_5\.0"):
        correction("rollout_is=token", "rollout_is_threshold=5_0.5")


def test_band_that_yaml_reads_as_a_number(tmp_path):
    (tmp_path / "mine.yaml").write_text("algorithm: {rollout_correction: {rollout_is_threshold: 0.5_5}}")
    config = load_config(config_path=tmp_path, config_name="mine")
    with pytest.raises(ConfigError, match=r"YAML reads 0\.5_5 as 0\.55"):
        resolve(config.algorithm.rollout_correction)


def test_correction_is_frozen_and_needs_no_torch():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Correction().rollout_is = "token"
    code = "import sys, verl.config.rollout_correction; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
