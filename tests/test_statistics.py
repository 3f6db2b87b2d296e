"""Claims about athena.statistics; the oracles are scipy's paired t-test, sign flips by brute force, and hand sums."""

import functools
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from athena.experiments import results
from athena.statistics import (
    chance,
    compare,
    coverage,
    data_efficiency,
    false_verdicts,
    family,
    paired,
    ratio,
    residuals,
    run_fields,
    summary,
    verdict,
)

pytestmark = pytest.mark.filterwarnings("error")

PLAIN = {
    "model": "mlp",
    "dataset": "mnist",
    "fraction": 0.1,
    "factor": 0.0,
    "seed": 0,
    "epochs": 3,
    "rule": "epsilon",
    "target": "softmax",
    "scope": "all",
    "normalise": None,
    "granularity": "sample",
    "learning_rate": 1e-3,
    "accuracies": [0.5, 0.9],
    "accuracy": 0.9,
    "seconds": 10.0,
    "stopped_at": None,
    "device": "cpu",
    "code": "1",
    "versions": {"torch": "2"},
    "fingerprint": "abc",
    "diverged": False,
}
BASIS_POINTS = st.integers(0, 10_000)


def study(*rows):
    return pd.DataFrame([{**PLAIN, **row} for row in rows])


def arms(plain, guided, **guidance):
    """Plain and guided runs of seeds 0, 1, ... with these accuracies."""
    guidance = {"factor": 1.0, **guidance}
    return [{"seed": seed, "accuracy": value} for seed, value in enumerate(plain)] + [
        {"seed": seed, "accuracy": value, **guidance} for seed, value in enumerate(guided)
    ]


def only(table):
    assert len(table) == 1
    return table.iloc[0]


@given(st.lists(st.tuples(BASIS_POINTS, BASIS_POINTS), min_size=2, max_size=13))
@settings(deadline=None, max_examples=20)
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    plain, guided = np.array(pairs).T / 10_000
    row = only(compare(study(*arms(plain, guided))))
    assert row["n"] == len(pairs)
    assert row["baseline_mean"] == pytest.approx(plain.mean())
    assert row["mean"] == pytest.approx(guided.mean())
    assert row["difference"] == pytest.approx((guided - plain).mean(), abs=1e-12)
    if len({b - a for a, b in pairs}) == 1:
        assert row["low"] == row["difference"] == row["high"]
    else:
        expected = stats.ttest_rel(guided, plain).confidence_interval(0.95)
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.lists(st.tuples(BASIS_POINTS, BASIS_POINTS), min_size=1, max_size=10))
@settings(deadline=None, max_examples=20)
def test_p_is_the_share_of_all_sign_flips_that_are_as_extreme(pairs):
    differences = [b - a for a, b in pairs]
    flips = [
        abs(sum(map(math.prod, zip(signs, differences, strict=True))))
        for signs in itertools.product((1, -1), repeat=len(pairs))
    ]
    expected = np.mean([flip >= abs(sum(differences)) for flip in flips])
    row = only(compare(study(*arms(*(np.array(pairs).T / 10_000)))))
    assert row["p"] == pytest.approx(expected, abs=1e-12)


def test_flips_of_equal_sum_count_as_ties_despite_rounding():
    differences = [0.04, 0.07, -0.06, -0.08, 0.07, -0.09, 0.05]  # sum to 0, but to 1e-17 in floating point
    row = only(compare(study(*arms([0.5] * 7, [0.5 + d for d in differences]))))
    assert row["p"] == 1.0


def test_beyond_sixteen_pairs_random_flips_come_close_to_the_exact_p():
    differences = np.random.default_rng(1).normal(0.02, 0.05, 17)
    signs = np.array(list(itertools.product((1, -1), repeat=17)))
    expected = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    frame = study(*arms([0.5] * 17, 0.5 + differences))
    assert only(compare(frame))["p"] == pytest.approx(expected, abs=0.004)
    assert only(compare(frame))["p"] == only(compare(frame))["p"]


def test_four_seeds_cannot_go_below_an_eighth():
    assert only(compare(study(*arms([0.1, 0.2, 0.1, 0.2], [0.91, 0.92, 0.93, 0.94]))))["p"] == 0.125


def test_holm_goes_over_all_cells_of_the_table_that_can_be_tested_at_all():
    gains = {0.1: [0.01] * 7, 0.2: [0.01] * 6 + [-0.01], 0.3: [0.01] * 4, 0.4: [0.01] * 6}
    rows = [
        row | {"fraction": fraction}
        for fraction, differences in gains.items()
        for row in arms([0.5] * len(differences), [0.5 + d for d in differences])
    ]
    table = compare(study(*rows))
    assert table["fraction"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert table["p"].tolist() == [2 / 128, 16 / 128, 2 / 16, 2 / 64]
    assert table["p_holm"].tolist() == pytest.approx([3 * 2 / 128, 16 / 128, 2 / 16, 2 * 2 / 64])


def test_plain_runs_pair_whatever_guidance_fields_they_carry_by_default():
    table = compare(
        study(*arms([0.8, 0.9], [0.9, 0.9], target="logits", rule="gamma", normalise="max", scope="linear"))
    )
    row = only(table)
    assert (row["n"], row["unpaired"], row["target"], row["scope"]) == (2, 0, "logits", "linear")
    assert row["difference"] == pytest.approx(0.05)


@pytest.mark.parametrize("field", ["model", "dataset", "fraction", "epochs", "learning_rate"])
def test_runs_that_differ_in_any_other_field_are_never_paired(field):
    guided = {"factor": 1.0, field: "cnn" if isinstance(PLAIN[field], str) else 7}
    with pytest.raises(ValueError, match=f"none of the 1 treatment runs.*share no value of {{'{field}'"):
        compare(study({}, guided))


def test_a_pair_shares_its_seed():
    accuracy = {0: 0.5, 1: 0.7, 2: 0.9}
    plain = [{"seed": seed, "accuracy": value} for seed, value in accuracy.items()]
    guided = [{"seed": seed, "accuracy": accuracy[seed] + 0.01, "factor": 1.0} for seed in (2, 0, 1)]
    row = only(compare(study(*guided, *plain)))
    assert row["low"] == row["high"] == pytest.approx(0.01)


@pytest.mark.parametrize("nothing", [None, float("nan"), pd.NA])
def test_none_and_nan_are_equal(nothing):
    frame = study({"schedule": nothing, "monitor": None}, {"schedule": None, "monitor": float("nan"), "factor": 1.0})
    frame = frame.astype({"schedule": object, "monitor": object})
    assert only(compare(frame))["n"] == 1
    assert only(compare(frame, baseline={"factor": 0, "monitor": nothing}))["n"] == 1


def test_two_fingerprints_of_one_data_set_are_never_pooled():
    frame = study(*arms([0.8, 0.8], [0.9, 0.9]), {"seed": 2, "fingerprint": "xyz"}, {"seed": 3, "dataset": "cifar10"})
    with pytest.raises(ValueError, match=r"'mnist' comes with 2 fingerprints \['abc', 'xyz'\]"):
        compare(frame)
    assert only(compare(frame[frame["fingerprint"] == "abc"]))["n"] == 2


def test_two_data_sets_each_with_its_own_fingerprint_are_two_cells():
    cifar = {"dataset": "cifar10", "fingerprint": "xyz"}
    table = compare(study(*arms([0.9], [0.8]), *(row | cifar for row in arms([0.5], [0.6]))))
    assert table[["dataset", "n"]].to_numpy().tolist() == [["cifar10", 1], ["mnist", 1]]


def test_runs_without_partner_are_left_out_and_counted():
    later = [{"fraction": 0.2, "factor": 1.0, "seed": seed} for seed in range(3)]
    table = compare(study(*arms([0.8, 0.8], [0.9, 0.8, 0.1]), *later)).set_index("fraction")
    assert table["n"].to_dict() == {0.1: 2, 0.2: 0}
    assert table["unpaired"].to_dict() == {0.1: 1, 0.2: 3}
    assert table.loc[0.1, "mean"] == pytest.approx(0.85)
    assert table.loc[0.2, ["difference", "low", "p", "p_holm"]].isna().all()
    assert table.loc[0.1, "p_holm"] == table.loc[0.1, "p"]


def test_the_same_run_twice_is_an_error_in_either_arm():
    rows = arms([0.8, 0.8], [0.9, 0.9])
    with pytest.raises(ValueError, match="same baseline run occurs twice"):
        compare(study(*rows, rows[0]))
    with pytest.raises(ValueError, match="same treatment run occurs twice"):
        compare(study(*rows, rows[-1]))


def test_two_plain_arms_ask_for_a_narrower_baseline():
    rows = [*arms([0.8], [0.9]), {"accuracy": 0.7, "target": "logits"}]
    with pytest.raises(ValueError, match=r"two baseline runs fit.*\{'target': \('softmax', 'logits'\)\}"):
        compare(study(*rows))
    table = compare(study(*rows), baseline={"factor": 0, "target": "softmax"})
    assert table[["factor", "target"]].to_numpy().tolist() == [[0.0, "logits"], [1.0, "softmax"]]


def test_a_field_named_in_the_baseline_may_differ_within_a_pair():
    longer = [{"seed": seed, "epochs": 4, "accuracy": 0.85} for seed in (0, 1)]
    table = compare(study(*arms([0.8, 0.8], [0.9, 0.9]), *longer), baseline={"factor": 0, "epochs": 4})
    assert table[["factor", "epochs"]].to_numpy().tolist() == [[0.0, 3], [1.0, 3]]
    assert table["difference"].tolist() == pytest.approx([-0.05, 0.05])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"baseline": {"factor": 3}},
            r"no run matches the baseline {'factor': 3}; the frame holds {'factor': \[0.0, 1",
        ),
        ({"baseline": {"model": "mlp"}}, "all 2 runs match the baseline"),
        ({"baseline": {"facto": 0}}, r"no column \['facto'\]"),
        ({"baseline": {"seed": 0}}, r"baseline names \['seed'\]"),
        ({"value": "loss"}, r"no column \['loss'\]"),
        ({"over": "factor"}, r"over='factor' is not a column that both arms share; choose one of \['model', 'dataset'"),
        ({"over": "seed"}, "over='seed'"),
        ({"confidence": 95}, "between 0 and 1"),
    ],
)
def test_errors_name_the_value_at_fault(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare(study(*arms([0.8], [0.9])), **arguments)


def test_a_run_without_a_value_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 runs have no finite 'accuracy'"):
        compare(study(*arms([0.8], [float("nan")])))


def test_a_diverged_run_counts_as_the_result_it_is():
    rows = arms([0.9, 0.9], [0.9, 0.1])
    rows[-1]["diverged"] = True
    row = only(compare(study(*rows)))
    assert row["n"] == 2
    assert row["mean"] == pytest.approx(0.5)


def test_one_pair_has_no_interval_and_p_one():
    row = only(compare(study(*arms([0.8], [0.9]))))
    assert row[["low", "high"]].isna().all()
    assert row["p"] == row["p_holm"] == 1.0
    assert verdict(row) == "cannot be tested"


@pytest.mark.parametrize("n", [2, 9, 10, 20])
def test_equal_differences_give_the_point_itself(n):
    plain = np.linspace(0.1, 0.9, n)
    row = only(compare(study(*arms(plain, plain + 1e-4))))
    assert row["low"] == row["high"] == row["difference"] == pytest.approx(1e-4)
    assert row["p"] == pytest.approx(max(2 / 2**n, 1e-5), abs=2e-5)


def test_accuracies_one_image_apart_are_equal_differences_despite_rounding():
    row = only(compare(study(*arms([0.8265, 0.2002, 0.4653, 0.8442], [0.8266, 0.2003, 0.4654, 0.8443]))))
    assert row["low"] == row["high"] == 1e-4


@pytest.mark.parametrize("n", [3, 12])
def test_equal_arms_show_no_effect(n):
    row = only(compare(study(*arms(np.linspace(0.1, 0.9, n), np.linspace(0.1, 0.9, n)))))
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


@given(st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=30), st.floats(0.5, 0.99))
def test_summary_is_students_interval(values, confidence):
    mean, low, high = summary(values, confidence)
    if np.ptp(values) > 1e-6:
        expected = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
        assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert mean == pytest.approx(np.mean(values))


def test_summary_refuses_values_that_are_not_finite():
    with pytest.raises(ValueError, match=r"finite values, got \[nan\]"):
        summary([0.1, float("nan")])
    assert np.isnan(summary([])).all()


def test_over_gives_the_mean_difference_over_fractions_for_each_seed():
    differences = {0: [0.00, 0.02, 0.04], 1: [0.01, 0.01, 0.07], 2: [-0.01, 0.00, 0.01]}
    rows = [
        {"seed": seed, "fraction": fraction, "factor": factor, "accuracy": 0.5 + seed / 10 + factor * difference}
        for seed, gains in differences.items()
        for fraction, difference in zip((0.01, 0.1, 1.0), gains, strict=True)
        for factor in (0.0, 1.0)
    ]
    row = only(compare(study(*rows), over="fraction"))
    assert "fraction" not in row
    assert (row["n"], row["unpaired"], row["dropped"]) == (3, 0, 0)
    assert row["baseline_mean"] == pytest.approx(0.6)
    assert row["difference"] == pytest.approx((0.02 + 0.03 + 0.00) / 3)
    expected = stats.ttest_1samp([0.02, 0.03, 0.00], 0).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["p"] == 0.5


def test_a_seed_that_lacks_a_fraction_in_one_arm_is_dropped_and_counted():
    rows = [
        {"seed": seed, "fraction": fraction, "factor": factor, "accuracy": 0.5 + seed * factor / 10}
        for seed, fraction, factor in itertools.product(range(4), (0.1, 0.2), (0.0, 1.0))
        if (seed, fraction, factor) not in {(0, 0.1, 0.0), (1, 0.2, 1.0)}
    ]
    row = only(compare(study(*rows), over="fraction"))
    assert (row["n"], row["dropped"], row["unpaired"]) == (2, 2, 1)
    assert row["difference"] == pytest.approx(0.25)


def test_an_endpoint_no_seed_has_reached_is_an_empty_row():
    rows = [*arms([0.8, 0.8], [0.9, 0.9]), {"fraction": 0.2}]
    row = only(compare(study(*rows), over="fraction"))
    assert (row["n"], row["dropped"]) == (0, 2)
    assert verdict(row) == "cannot be tested"


@given(st.randoms(use_true_random=False), st.sampled_from([None, "fraction"]), st.sampled_from([4, 11]))
@settings(deadline=None, max_examples=5)
def test_the_order_of_rows_does_not_matter(random, over, seeds):
    numbers = np.random.default_rng(0)
    rows = [
        {"seed": seed, "fraction": fraction, "factor": factor, "accuracy": numbers.uniform()}
        for seed, fraction, factor in itertools.product(range(seeds), (0.1, 0.2), (0.0, 1.0, 10.0))
    ]
    expected = compare(study(*rows), over=over)
    random.shuffle(rows)
    pd.testing.assert_frame_equal(compare(study(*rows), over=over), expected, check_exact=True)


def test_settings_that_are_lists_or_tables_are_compared_by_content():
    rows = [{"seed": seed, "preset": ["a", {"b": 1}]} for seed in (0, 1)]
    rows += [{**row, "factor": {"fc1": 0.5}, "scope": ["fc1"]} for row in rows]
    row = only(compare(study(*rows)))
    assert (row["n"], row["factor"], row["scope"]) == (2, (("fc1", 0.5),), ("fc1",))


def test_factors_may_mix_numbers_and_words():
    rows = [*arms([0.8], [0.9]), {"factor": "learn"}, {"factor": -0.5}]
    assert compare(study(*rows))["factor"].tolist() == [-0.5, 1.0, "learn"]


def test_run_fields_leave_out_the_bookkeeping():
    assert run_fields(study({}))[-1] == "learning_rate"


@pytest.mark.parametrize("column", ["device", "code"])
def test_a_pair_of_two_devices_or_of_two_versions_of_the_code_is_refused_and_counted(column):
    rows = arms([0.8, 0.8, 0.8], [0.9, 0.9, 0.9])
    rows[-1][column] = "another"
    row = only(compare(study(*rows)))
    assert (row["n"], row["unpaired"], row["refused"]) == (2, 0, 1)
    assert only(compare(study(*rows), any_code=True))["n"] == (3 if column == "code" else 2)


def test_where_all_pairs_are_refused_the_error_says_what_sets_them_apart():
    rows = [row | {"code": "2"} if "factor" in row else row for row in arms([0.8, 0.8], [0.9, 0.9])]
    with pytest.raises(ValueError, match=r"share no value of {'code': \(\['1'\], \['2'\]\)}"):
        compare(study(*rows))
    assert only(compare(study(*rows), any_code=True))["n"] == 2


def test_the_same_runs_on_two_devices_are_paired_within_each_device_and_then_twins():
    rows = arms([0.8, 0.8], [0.9, 0.9])
    elsewhere = [row | {"device": "another"} for row in rows]
    with pytest.raises(ValueError, match="same treatment run occurs twice"):
        compare(study(*rows, *elsewhere))
    assert only(compare(study(*rows, *elsewhere[:2])))["n"] == 2


def test_ratio_is_the_geometric_mean_with_students_interval_on_the_log():
    rows = arms([0, 0, 0], [0, 0, 0])
    for row, seconds in zip(rows, [10.0, 20.0, 40.0, 15.0, 40.0, 60.0], strict=True):
        row["seconds"] = seconds
    row = only(ratio(study(*rows)))
    logs = np.log([1.5, 2.0, 1.5])
    expected = stats.ttest_1samp(logs, 0).confidence_interval()
    assert row["ratio"] == pytest.approx(4.5 ** (1 / 3))
    assert (row["low"], row["high"]) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    back = only(ratio(study(*rows), baseline={"factor": 1}))
    assert back["ratio"] == pytest.approx(1 / row["ratio"])
    assert back["low"] == pytest.approx(1 / row["high"])


def test_ratio_pairs_runs_of_one_device_only():
    rows = arms([0, 0], [0, 0])
    rows[-1]["device"] = "another"
    row = only(ratio(study(*rows)))
    assert (row["n"], row["unpaired"], row["refused"]) == (1, 0, 1)


def test_ratio_refuses_values_that_are_not_positive():
    with pytest.raises(ValueError, match="above 0, but 'seconds' goes down to 0"):
        ratio(study({"seconds": 0.0}, {"factor": 1.0}))


SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def curves(plain, guided, seeds=4, noise=0.0, rng=None):
    """Runs of both arms at every share; `plain` and `guided` are functions of the share."""
    rng = rng or np.random.default_rng(1)
    return study(
        *(
            {"fraction": share, "seed": seed, "factor": factor, "accuracy": of(share) + noise * rng.normal()}
            for factor, of in ((0.0, plain), (1.0, guided))
            for share in SHARES
            for seed in range(seeds)
        )
    )


def logarithmic(share):
    return 0.9 + 0.1 * math.log(share)


@pytest.mark.parametrize("times", [0.5, 1.0, 1.7, 3.0])
def test_a_curve_shifted_along_the_data_needs_as_many_times_fewer(times):
    row = only(data_efficiency(curves(logarithmic, lambda share: logarithmic(times * share))))
    assert row["ratio"] == pytest.approx(times, rel=1e-9)
    assert row["low"] == pytest.approx(times, rel=1e-9) and row["high"] == pytest.approx(times, rel=1e-9)
    assert row["n"] == 4
    assert row["reached_from"] == pytest.approx(logarithmic(max(1.0, times) * 0.01))
    assert row["reached_to"] == pytest.approx(logarithmic(min(1.0, times)))


def test_the_interval_is_students_over_the_log_ratios_of_the_seeds():
    frame = curves(logarithmic, lambda share: logarithmic(1.5 * share), seeds=8, noise=0.02)
    row = only(data_efficiency(frame))
    logs = [math.log(only(data_efficiency(frame[frame["seed"] == seed]))["ratio"]) for seed in range(8)]
    expected = stats.ttest_1samp(logs, 0).confidence_interval()
    assert row["ratio"] == pytest.approx(math.exp(np.mean(logs)))
    assert (row["low"], row["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [4, 10])
@pytest.mark.parametrize("times", [1.0, 1.5])
def test_the_interval_of_data_efficiency_covers(seeds, times):
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(250):
        plain, guided = (lambda share: logarithmic(share)), (lambda share: logarithmic(times * share))
        frame = curves(plain, guided, seeds=seeds, noise=0.02, rng=rng)
        row = only(data_efficiency(frame))
        hits.append(row["low"] <= times <= row["high"])
    assert 0.91 <= np.mean(hits) <= 0.99


def test_where_no_accuracy_is_reached_by_both_there_is_no_ratio():
    row = only(data_efficiency(curves(logarithmic, lambda share: logarithmic(share) - 1)))
    assert row[["ratio", "low", "high", "reached_from", "reached_to"]].isna().all()
    assert (row["n"], row["unreached"]) == (0, 4)


def test_a_curve_that_collapses_is_read_as_the_level_that_it_keeps():
    """Its fit is flat where it would fall, so that more data never count as fewer."""
    row = only(data_efficiency(curves(logarithmic, lambda share: logarithmic(share) if share < 0.5 else 0.3)))
    assert row["ratio"] < 1
    assert row["reached_to"] < logarithmic(0.2)


def test_one_seed_has_a_ratio_and_no_interval():
    row = only(data_efficiency(curves(logarithmic, logarithmic, seeds=1)))
    assert row["ratio"] == 1 and math.isnan(row["low"]) and math.isnan(row["high"])


def test_data_efficiency_uses_whole_seeds():
    frame = curves(logarithmic, logarithmic)
    row = only(data_efficiency(frame.drop(frame.query("factor == 1 and seed == 2 and fraction == 0.5").index)))
    assert row["n"] == 3 and row["dropped"] == 1


# The family ----------------------------------------------------------------------------------------------------------


def gains(*cells):
    """A table of `compare` with one cell for each list of differences."""
    rows = [
        row | {"fraction": (k + 1) / 100}
        for k, differences in enumerate(cells)
        for row in arms([0.5] * len(differences), [0.5 + d for d in differences])
    ]
    return compare(study(*rows))


def test_a_family_of_two_tables_is_corrected_as_one():
    whole = gains([0.01] * 7, [0.01] * 8, [0.01, 0.02, -0.01, 0.03], [0.01] * 9)
    tables = family(gains([0.01] * 7, [0.01] * 8), gains([0.01, 0.02, -0.01, 0.03], [0.01] * 9))
    for column in ("p_holm", "p_least", "detectable"):
        assert [*tables[0][column], *tables[1][column]] == whole[column].tolist()
    assert tables[0]["fraction"].tolist() == [0.01, 0.02]


@pytest.mark.slow
@given(st.lists(st.sampled_from([0.001, 0.004, 0.01, 0.02, 0.03, 0.5, 1.0]), min_size=1, max_size=12))
@settings(max_examples=10)
def test_holms_correction_is_that_of_statsmodels(p):
    table = pd.DataFrame({"n": 8, "sd": 0.1, "p": p})
    for column in ("p_holm", "p_least", "detectable"):
        table[column] = np.nan
    assert family(table)[0]["p_holm"].tolist() == pytest.approx(multipletests(p, method="holm")[1].tolist())


def test_a_cell_without_a_pair_does_not_count_in_the_family():
    rows = [*arms([0.5] * 7, [0.51] * 7), {"fraction": 0.2, "factor": 1.0}]
    assert compare(study(*rows))["p_holm"].tolist()[0] == 2 / 128


@pytest.mark.parametrize("n, m, testable", [(5, 1, False), (6, 1, True), (8, 6, True), (8, 7, False), (9, 10, True)])
def test_so_few_pairs_cannot_be_tested_whatever_they_measure(n, m, testable):
    noise = [0.01, -0.01] * (n // 2) + [0.0] * (n % 2)
    table = gains(*[noise] * m)
    assert table["p_least"].tolist() == pytest.approx([m * 2 / 2**n] * m)
    assert {verdict(row) for _, row in table.iterrows()} == {"no effect shown" if testable else "cannot be tested"}
    assert np.isfinite(table["detectable"]).all() == testable


def test_p_least_is_what_holm_would_give_if_all_differences_of_a_cell_pointed_one_way():
    table = gains([0.01] * 8, [0.01, -0.02] * 4, [0.03, -0.01] * 3)
    expected = gains([0.01] * 8, [0.01, 0.02] * 4, [0.03, -0.01] * 3)["p_holm"][1]
    assert table["p_least"][1] == expected < table["p_holm"][1]


@pytest.mark.slow
@pytest.mark.parametrize("n, m", [(10, 1), (10, 12), (30, 1)])
def test_the_detectable_effect_is_found_in_four_of_five_samples(n, m):
    rng = np.random.default_rng(0)
    effect = gains(*[list(rng.normal(0, 0.01, n)) for _ in range(m)])
    effect, sd = effect["detectable"][0] / effect["sd"][0], 0.01
    samples = rng.normal(effect * sd, sd, (4000, n))
    p = stats.ttest_1samp(samples, 0, axis=1).pvalue
    assert np.mean(p < 0.05 / m) == pytest.approx(0.8, abs=0.025)


# On the residuals of the studies -------------------------------------------------------------------------------------


@functools.cache
def rest_of(study):
    return residuals(results(study).query("precision != 'bfloat16'"))


@pytest.mark.parametrize("n", [4, 10, 15, 30])
@pytest.mark.parametrize("study", ["cifar-again", "mnist-first", "mnist-factors"])
def test_the_interval_covers_94_to_97_percent_on_the_residuals_of_the_studies(study, n):
    assert 0.94 - 0.01 <= coverage(rest_of(study), n) <= 0.97 + 0.01


def test_residuals_have_no_mean_in_any_cell_and_a_spread_of_one():
    rest = residuals(study(*arms([0.5] * 5, [0.51, 0.52, 0.53, 0.53, 0.60])))
    assert rest.mean() == pytest.approx(0) and rest.std(ddof=1) == pytest.approx(5 / 4)
    assert rest[4] > 1.5 and (rest[:4] < 0).all()


def test_an_interval_of_a_few_very_skewed_values_covers_less():
    skewed = np.array([0.0] * 99 + [100.0])
    assert coverage(skewed, 4) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("n, shares", [(6, 1), (10, 1), (10, 12), (12, 4)])
def test_a_method_without_effect_is_given_a_verdict_in_no_more_than_5_percent_of_the_studies(n, shares):
    # The sign-flip test uses up all of its 5 %, so a count above 15 is common: one in a thousand is above this one.
    assert 300 * false_verdicts(rest_of("cifar-again"), n, shares) <= stats.binom.ppf(0.999, 300, 0.05)


def test_chance_has_the_spread_that_was_measured_and_no_effect():
    rng = np.random.default_rng(0)
    rows = [
        row | {"fraction": share}
        for share, sd in ((0.1, 0.01), (0.5, 0.02))
        for row in arms([0.5] * 40, 0.55 + sd * rng.normal(size=40))
    ]
    found = chance(study(*rows), seeds=4)
    sd = [np.std([row["accuracy"] for row in rows if row["fraction"] == share][40:], ddof=1) for share in (0.1, 0.5)]
    assert len(found) == 20_000 and abs(found["mean"].mean()) < 0.0003
    assert found["mean"].std() == pytest.approx((sd[0] ** 2 + sd[1] ** 2) ** 0.5 / 2 / 2, rel=0.03)
    assert (found["largest"] >= found["mean"]).all()
    assert found["positive"].value_counts(normalize=True).sort_index().tolist() == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.02
    )


def test_chance_needs_a_spread():
    rows = [*arms([0.5] * 2, [0.6] * 2), *(row | {"fraction": 0.2} for row in arms([0.5], [0.6]))]
    with pytest.raises(ValueError, match=r"at a share of 0\.2 there are 1 pairs"):
        chance(study(*rows))


# The verdict ---------------------------------------------------------------------------------------------------------


def row_of(low, high, p_holm, p_least=0.01, **more):
    return {"low": low, "high": high, "p_holm": p_holm, "p_least": p_least, **more}


@pytest.mark.parametrize(
    "row, expected",
    [
        (row_of(0.01, 0.02, 0.04), "gain"),
        (row_of(-0.02, -0.01, 0.04), "loss"),
        (row_of(0.01, 0.02, 0.06), "no effect shown"),
        (row_of(-0.01, 0.02, 0.04), "no effect shown"),
        (row_of(-0.01, 0.02, 1.0, 0.05), "cannot be tested"),
        (row_of(float("nan"), float("nan"), 1.0, 1.0), "cannot be tested"),
        (row_of(float("nan"), float("nan"), float("nan"), float("nan")), "cannot be tested"),
        (row_of(-0.01, 0.02, 1.0, published=0.03, p_published=0.01), "published number ruled out"),
        (row_of(-0.01, 0.02, 1.0, published=0.03, p_published=0.06), "no effect shown"),
        (row_of(-0.01, 0.02, 1.0, published=0.01, p_published=0.01), "no effect shown"),
        (row_of(-0.02, -0.01, 0.04, published=0.03, p_published=0.01), "loss"),
    ],
)
def test_the_verdict_needs_both_the_interval_and_the_p(row, expected):
    assert verdict(row) == expected


def test_a_published_number_is_tested_by_the_sign_flips_of_what_is_measured_minus_it():
    differences = [0.001, 0.002, -0.001, 0.0, 0.003, 0.001, -0.002]
    rows = arms([0.5] * 7, [0.5 + d for d in differences])
    row = only(compare(study(*rows), published=0.01))
    shifted = only(compare(study(*arms([0.51] * 7, [0.5 + d for d in differences]))))
    assert (row["published"], row["p_published"]) == (0.01, shifted["p"]) == (0.01, 2 / 128)
    assert verdict(row) == "published number ruled out"
    assert verdict(only(compare(study(*rows), published=0.001))) == "no effect shown"


def test_eight_seeds_of_clear_gain_are_a_gain_and_its_mirror_a_loss():
    plain, guided = [0.5] * 8, [0.5 + d / 100 for d in range(1, 9)]
    assert verdict(only(compare(study(*arms(plain, guided))))) == "gain"
    assert verdict(only(compare(study(*arms(guided, plain))))) == "loss"


def test_paired_leaves_the_runs_with_a_partner():
    frame = pd.DataFrame(
        [(0.1, 0, 0.0), (0.1, 0, 0.1), (0.1, 1, 0.0), (0.5, 1, 0.1), (0.5, 2, 0.0), (0.5, 2, 0.1)],
        columns=["fraction", "seed", "factor"],
    )
    assert list(paired(frame).index) == [0, 1, 4, 5]
    assert paired(frame.iloc[:0]).empty


def test_a_baseline_may_be_named_by_a_text_that_is_none():
    rows = arms([0.5, 0.6], [0.7, 0.8], factor=0.0, use="features")
    row = only(compare(study(*[{"use": None, **row} for row in rows]), {"use": None}))
    assert row["n"] == 2
    assert row["difference"] == pytest.approx(0.2)
