"""How candidates for a plan are compared."""

import numpy as np
import pytest

from ertacache.calibration.choice import geometric_mean, typical_error


def test_the_geometric_mean_is_the_mean_in_decibels():
    errors = np.array([1e-4, 1e-2, 1e-6])
    assert 10 * np.log10(geometric_mean(errors)) == pytest.approx(np.mean(10 * np.log10(errors)))


@pytest.mark.parametrize(("prompts", "counted"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (8, 6), (32, 24)])
def test_a_quarter_of_the_prompts_may_tip_to_another_image(prompts, counted):
    errors = np.full(prompts, 1e-5)
    errors[counted:] = 0.5
    assert typical_error(errors[::-1]) == pytest.approx(1e-5)
    errors[counted - 1] = 0.5
    assert typical_error(errors) > 1e-5 * 1.2


def test_no_error_is_none():
    assert typical_error(np.zeros(4)) == 0
