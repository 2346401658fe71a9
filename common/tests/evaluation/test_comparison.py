"""What is said of a measured speed-up."""

import pytest

from ertacache.evaluation.comparison import doubt


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([[2.0, 2.0], [1.0, 1.0]], ""),
        ([[2.02, 2.02], [1.0, 1.0]], ""),
        ([[2.1, 2.1], [1.0, 1.0]], "; it cannot be above 2.00×: measure again on an idle machine"),
        ([[1.0, 1.0], [2.0, 2.0]], "; slower than without a plan: measure again on an idle machine"),
        ([[2.0, 2.6], [1.2, 1.2]], "; repeats differ by 30 %: measure again on an idle machine"),
    ],
)
def test_a_speed_up_that_cannot_be_is_said(times, said):
    assert doubt(times, 2.0) == said
