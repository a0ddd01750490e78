"""ε against reference values that two unrelated accountants agreed on, and against closed forms."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from scipy import optimize, stats

from securefedcollm.errors import ConfigError
from securefedcollm.privacy.accounting import (
    TIGHT_SHARE,
    calibrate,
    calibrate_events,
    claim,
    epsilon,
    ideal_epsilon,
    prv_bounds,
    quick_epsilon,
    refuse_unpayable,
)
from securefedcollm.privacy.adversaries import per_adversary
from securefedcollm.privacy.events import (
    DiscreteGaussian,
    Gaussian,
    PoissonGaussian,
    merge,
)

P = PoissonGaussian
REFERENCE = [
    # events, δ, PLD, RDP, PRV upper bound
    ([Gaussian(1.0)], 1e-5, 4.377178, 4.728507, 4.387414),
    ([Gaussian(1.0, 10)], 1e-5, 17.856587, 19.053598, 17.867304),
    ([Gaussian(2.0, 50)], 1e-5, 20.675508, 22.019852, 20.686308),
    ([Gaussian(5.0, 20)], 1e-6, 4.305841, 4.604529, 4.316032),
    ([Gaussian(10.0, 100)], 1e-6, 4.886554, 5.221540, 4.896766),
    (
        [Gaussian(1.0, 5), Gaussian(1.5, 10), Gaussian(2.0, 20)],
        1e-5,
        22.763534,
        24.219810,
        22.774393,
    ),
    ([P(0.01, 1.0, 1000)], 1e-5, 1.828244, 2.101367, 1.838372),
    ([P(0.01, 1.1, 10_000)], 1e-5, 5.192620, 5.632011, 5.202865),
    ([P(0.001, 0.8, 10_000)], 1e-6, 0.947324, 1.703625, 0.957280),
    ([P(0.1, 1.2, 100)], 1e-5, 5.075092, 5.665091, 5.085421),
    (
        [P(0.05, 1.0, 50), P(0.1, 1.5, 100), P(0.02, 0.9, 200)],
        1e-5,
        4.813517,
        5.353566,
        4.823819,
    ),
]


@pytest.mark.parametrize(("events", "delta", "pld", "rdp", "prv"), REFERENCE)
def test_reference_table(events, delta, pld, rdp, prv):
    merged = merge(events)
    assert ideal_epsilon(merged, delta, "pld") == pytest.approx(pld, abs=2e-6)
    assert ideal_epsilon(merged, delta, "rdp") == pytest.approx(rdp, abs=2e-6)
    # opacus and prv-accountant discretise differently; the note's values are opacus'
    assert ideal_epsilon(merged, delta, "prv") == pytest.approx(prv, abs=5e-4)
    # what the code releases is charged for its residuals too: never less, and barely more
    charged = epsilon(events, delta, "pld")
    assert ideal_epsilon(merged, delta, "pld") <= charged + 1e-9
    assert charged == pytest.approx(pld, abs=5e-4)


def analytic_gaussian(mu: float, delta: float) -> float:
    """Exact ε of the Gaussian mechanism (Balle and Wang 2018, Theorem 8), from scipy alone."""

    def excess(eps: float) -> float:
        first = stats.norm.cdf(mu / 2 - eps / mu)
        return first - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu)) - delta

    return float(optimize.brentq(excess, 0.0, 200.0, xtol=1e-12))


@pytest.mark.parametrize("events", [REFERENCE[1][0], REFERENCE[3][0], REFERENCE[5][0]])
def test_pld_is_the_closed_form_for_gaussians(events):
    mu = math.sqrt(sum(event.count / event.noise_multiplier**2 for event in events))
    exact = analytic_gaussian(mu, 1e-5)
    assert exact - 1e-9 <= ideal_epsilon(merge(events), 1e-5, "pld") <= exact + 2e-6


@pytest.mark.parametrize("case", [REFERENCE[1], REFERENCE[6]])
def test_second_accountant_brackets_the_claim(case):
    events, delta, *_ = case
    lower, estimate, upper = prv_bounds(events, delta)
    assert lower < claim(events, delta).epsilon < upper
    assert estimate == pytest.approx(claim(events, delta).epsilon, abs=1e-4)


def test_zcdp_reference():
    """ρ = T Δ²/(2hσᵢ²) = 0.2 at z = 5, T = 10."""
    event = DiscreteGaussian(5 * 2**18 / math.sqrt(6), 2**18, 100_000, 6, 0, 10)
    assert epsilon([event], 1e-5, "zcdp") == pytest.approx(2.81365, abs=1e-5)
    assert epsilon([event], 1e-5, "rdp") == pytest.approx(2.81365, abs=1e-5)


def test_colluders_and_dropouts_are_paid_for():
    """n = 10, z = 5, T = 10: shares of σ²/10 with 8 survivors of whom 2 collude are too little;
    shares of σ²/6 are designed for just that."""
    bound = 2**18
    naive = DiscreteGaussian(5 * bound / math.sqrt(10), bound, 100_000, 8, 2, 10)
    sized = DiscreteGaussian(5 * bound / math.sqrt(6), bound, 100_000, 8, 2, 10)
    assert claim([naive], 1e-5).epsilon == pytest.approx(3.752, abs=5e-4)
    assert claim([sized], 1e-5).epsilon == pytest.approx(2.814, abs=5e-4)
    assert (sized.share_sigma / naive.share_sigma) ** 2 * 6 / 10 == pytest.approx(1.0)


def test_calibration_of_discrete_noise():
    def at(z):
        return [DiscreteGaussian(z * 2**18 / math.sqrt(8), 2**18, 11_264, 10, 2, 10)]

    z = calibrate_events(at, 8.0, 1e-5)
    assert z == pytest.approx(2.01649, abs=1e-4)
    assert claim(at(z), 1e-5).epsilon <= 8.0 < claim(at(z - 2e-4), 1e-5).epsilon


@pytest.mark.parametrize(
    ("target", "q", "steps"),
    [
        (8.0, 256 / 3000, 60),
        (1.0, 0.01, 1000),
        (3.0, 1.0, 10),
        # a little less noise, and the residuals take all of δ: ε is infinite
        pytest.param(35.0, 0.5, 10, marks=pytest.mark.soak),
    ],
)
def test_calibrate_is_tight_and_never_over(target, q, steps):
    z = calibrate(target, 1e-5, q, steps)

    def at(noise):
        event = Gaussian(noise, steps) if q == 1.0 else P(q, noise, steps)
        return epsilon([event], TIGHT_SHARE * 1e-5)

    assert at(z) <= target
    assert at(z - 3e-4) > target


def test_calibrate_says_when_it_cannot():
    with pytest.raises(ConfigError, match="no noise reaches"):
        calibrate(1e-9, 1e-5, 1.0, 10**6)
    with pytest.raises(ConfigError, match="above 0"):
        calibrate(0.0, 1e-5, 0.1, 10)
    with pytest.raises(ConfigError, match="residuals would take all of δ"):
        calibrate(45.0, 1e-5, 0.5, 10)
    with pytest.raises(ConfigError, match=r"delta: at ε = 8 .* all of δ") as caught:
        calibrate(8.0, 1e-20, 0.1, 60)
    assert "raise δ above 3e-16" in caught.value.hint
    with pytest.raises(ConfigError, match=r"privacy.delta: at ε = 25 .* all of δ"):
        calibrate(25.0, 1e-20, 0.1, 60)
    with pytest.raises(ConfigError, match=r"privacy.epsilon: at ε = 50 .* all of δ") as caught:
        calibrate(50.0, 1e-5, 0.5, 10)
    assert "lower ε, here to 22" in caught.value.hint
    assert calibrate(22.0, 1e-5, 0.5, 10) > 0  # the hint is true


@pytest.mark.parametrize(("target", "delta"), [(8.0, 1e-20), (8.0, 1e-19), (25.0, 1e-20)])
def test_what_no_rate_can_pay_is_known_without_one(target, delta):
    slack = PoissonGaussian(1.0, 1.0, 60).slack
    with pytest.raises(ConfigError) as known:
        refuse_unpayable(target, TIGHT_SHARE * delta, slack)
    for q in (0.01, 0.5):
        with pytest.raises(ConfigError) as found:
            calibrate(target, delta, q, 60)
        assert (found.value.where, found.value.message) == (known.value.where, known.value.message)
    refuse_unpayable(8.0, 1e-5, slack)


def test_sampled_discrete_noise_is_charged_as_the_continuous_one_at_integer_orders():
    """Joint DP-SGD: the lattice moments of order l <= α equal the continuous ones. Checked by
    summing the series outright at a σ where the lattice is coarse."""
    sigma, shift, q, alpha = 4.0, 3, 0.2, 5
    grid = range(-130, 131)
    p0 = [math.exp(-(x**2) / (2 * sigma**2)) for x in grid]
    p1 = [math.exp(-((x - shift) ** 2) / (2 * sigma**2)) for x in grid]
    total = sum(p0)
    forth = sum(a * ((1 - q) + q * b / a) ** alpha for a, b in zip(p0, p1, strict=True)) / total
    back = (
        sum(
            ((1 - q) * a + q * b) * (a / ((1 - q) * a + q * b)) ** alpha
            for a, b in zip(p0, p1, strict=True)
        )
        / total
    )
    from dp_accounting.rdp.rdp_privacy_accountant import _compute_rdp_poisson_subsampled_gaussian

    (bound,) = _compute_rdp_poisson_subsampled_gaussian(q, sigma / shift, [alpha])
    assert math.log(forth) / (alpha - 1) == pytest.approx(bound, rel=1e-9)
    assert back < forth


def test_sampled_discrete_noise_goes_to_rdp():
    event = DiscreteGaussian(2**18, 2**18, 11_264, 4, 1, 60, 0.085)
    found = claim([event], 1e-5)
    assert found.accountant == "rdp"
    same = P(0.085, event.noise_multiplier, 60)
    assert claim([same], 1e-5).epsilon < found.epsilon < epsilon([same], 1e-5, "rdp") * 1.05


@pytest.mark.parametrize(
    ("accountant", "event"),
    [
        ("pld", DiscreteGaussian(100.0, 100, 10, 3)),
        ("prv", DiscreteGaussian(100.0, 100, 10, 3)),
        ("zcdp", P(0.1, 1.0, 10)),
        ("zcdp", DiscreteGaussian(100.0, 100, 10, 3, q=0.5)),
    ],
)
def test_an_accountant_refuses_what_it_cannot_account_for(accountant, event):
    with pytest.raises(ConfigError, match="no analysis") as caught:
        epsilon([event], 1e-5, accountant)
    assert "rdp" in caught.value.hint


@pytest.mark.parametrize("accountant", ["gdp", "", "PLD"])
def test_unknown_accountants_are_refused(accountant):
    with pytest.raises(ConfigError, match="no accountant"):
        epsilon([Gaussian(1.0)], 1e-5, accountant)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_out_of_range(delta):
    with pytest.raises(ConfigError, match="δ"):
        epsilon([Gaussian(1.0)], delta)


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0.0
    assert claim([], 1e-5).epsilon == 0.0


def test_a_shuffled_epoch_charged_as_poisson_would_be_far_off():
    """Why only our own loader may be charged as PoissonGaussian (Annamalai et al. 2024)."""
    shuffled_at_least = 5.235
    assert epsilon([P(1 / 1000, 0.8, 1000)], 1e-5) < 0.5
    # one epoch in which every record takes part once, charged as this project charges it
    assert epsilon([Gaussian(0.8)], 1e-5) > shuffled_at_least


def test_slack_is_booked():
    """A σ barely above the floor with many values: the sum's gap to one discrete Gaussian counts,
    and where it passes δ the answer is infinite, not silently small."""
    event = DiscreteGaussian(4.0, 4, 10**7, 100)
    assert event.sum_gap == pytest.approx(2.6e-61, rel=0.05)
    assert epsilon([event], 1e-5, "zcdp") < 1
    assert epsilon([event], 1e-21, "zcdp") == math.inf
    with pytest.raises(ConfigError, match="too coarse"):
        DiscreteGaussian(3.9, 4, 10, 10)


def test_quick_bound_is_a_bound():
    event = P(256 / 3000, 0.7777, 60)
    exact = claim([event], 1e-5).epsilon
    for enough in (20.0, 8.0, exact + 1e-6, exact - 1e-6, 1.0):
        bound = quick_epsilon([event], 1e-5, enough)
        assert bound >= exact
        assert (bound <= enough) == (exact <= enough)


def test_adversaries():
    event = DiscreteGaussian(2.0 * 2**18, 2**18, 11_264, 8, 2, 10)
    table = {row.adversary: row for row in per_adversary([event], [1e-5, 1e-6], colluders=2)}
    order = [table[name].epsilons[0].epsilon for name in ("outsider", "server", "server+2 silos")]
    assert order[0] == order[1] < order[2] == claim([event], 1e-5).epsilon
    one_silo = table["another silo"].epsilons[0].epsilon
    assert order[1] < one_silo < order[2]
    assert all(row.epsilons[1].epsilon > row.epsilons[0].epsilon for row in table.values())
    local = per_adversary([P(0.1, 1.0, 10)], [1e-5], colluders=3)
    assert len({row.epsilons[0].epsilon for row in local}) == 1


def test_accountants_are_imported_only_when_asked():
    code = (
        "import sys, securefedcollm.privacy.ledger, securefedcollm.privacy.noise, "
        "securefedcollm.privacy.accounting, securefedcollm.privacy.quantise\n"
        "heavy = {'torch', 'scipy', 'dp_accounting', 'prv_accountant', 'mpmath'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rate", [0.11, 0.12, 0.125])
def test_prv_gives_an_answer_where_its_quadrature_misses_the_mass(rate):
    """With the library's own mean, the control, it gives none at these rates."""
    events = (PoissonGaussian(q=rate, noise_multiplier=0.7614, steps=16),)
    low, _, high = prv_bounds(events, 1e-5)
    pld = epsilon(events, 1e-5, "pld")
    assert low <= pld <= high + 0.01
    assert high - low < 0.05
