import pytest

from ertacache.evaluation.ranking import margin, markdown, ordered, ranking, reaches


def row(label, family, asked=2, speedup=2.0, folder="room", **values):
    method = "none" if family == "none" else label.split()[0]
    numbers = {"nfe": 30 / speedup, "speedup_nfe": speedup, "speedup_flops": speedup, "psnr": None, "lpips": None}
    return {"folder": folder, "label": label, "method": method, "family": family, "asked": asked, **numbers, **values}


ROWS = [
    row("uncached", "none", asked=None, speedup=1.0),
    row("tea (δ = 1)", "peer", psnr=60.0, lpips=0.01),
    row("budget", "budget", psnr=70.0, lpips=0.02),
    row("mag", "peer", psnr=60.0, lpips=0.04),
    row("fewer", "steps", psnr=50.0),
    row("λ", "ertacache", psnr=55.0),
    row("slow", "peer", speedup=1.7, psnr=99.0, lpips=0.0),
    row("blind", "peer", speedup=2.5),
    row("elsewhere", "peer", folder="other", psnr=80.0),
    row("tea (δ = 2)", "peer", asked=5, speedup=5.0, psnr=40.0),
    row("budget", "budget", asked=5, speedup=4.5, psnr=38.5),
]


def places(*arguments):
    return [(place, found["label"]) for place, found in ranking(ROWS, *arguments)]


def test_ties_share_a_place_and_the_slow_have_none():
    expected = [(1, "budget"), (2, "tea (δ = 1)"), (2, "mag"), (4, "λ"), (5, "fewer")]
    assert places("room", 2, "psnr") == expected
    assert places("other", 2, "psnr") == [(1, "elsewhere")] and places("room", 3, "psnr") == []


def test_a_peer_that_wins_is_first():
    assert places("room", 5, "psnr") == [(1, "tea (δ = 2)"), (2, "budget")]
    assert margin(ROWS, "room", 5, "psnr") == -1.5


def test_less_is_better_for_lpips():
    assert places("room", 2, "lpips") == [(1, "tea (δ = 1)"), (2, "budget"), (3, "mag")]
    assert margin(ROWS, "room", 2, "lpips") == pytest.approx(0.01)


def test_margin_needs_both_sides():
    assert margin(ROWS, "room", 2, "psnr") == 10.0
    assert margin(ROWS, "other", 2, "psnr") is None and margin(ROWS[:1] + ROWS[2:3], "room", 2, "psnr") is None


@pytest.mark.parametrize(
    ("flops", "calls", "expected"),
    [(1.8, 1.0, True), (1.79, 9.0, False), (None, 1.8, True), (None, 1.79, False)],
)
def test_speedup_is_by_flops_and_by_calls_where_flops_are_missing(flops, calls, expected):
    assert reaches({"speedup_flops": flops, "speedup_nfe": calls}, 2) is expected


def test_rows_without_an_asked_speedup_are_not_ranked():
    assert ranking(ROWS, "room", None, "psnr") == [] and ordered(ROWS)[0] == (None, ROWS[0])


def test_markdown_marks_the_best_of_what_is_ranked():
    rows = [found for found in ROWS if found["folder"] == "room"]
    lines = markdown(rows, ["label", "nfe", "speedup_flops", "psnr", "lpips", "place"]).splitlines()
    assert lines[:3] == [
        "| method | NFE | FLOPs speed-up | PSNR, dB | LPIPS | place |",
        "| --- | --: | --: | --: | --: | --: |",
        "| uncached | 30 | 1.00× | – | – | – |",
    ]
    assert lines[3] == "| budget | 15 | 2.00× | **70.00** | 0.0200 | 1 |"
    assert lines[4] == "| tea (δ = 1) | 15 | 2.00× | 60.00 | **0.0100** | 2 |"
    assert "| slow | 17.6 | 1.70× | 99.00 | 0.0000 | – |" in lines
    assert "| blind | **12** | **2.50×** | – | – | – |" in lines
    assert lines[-2:] == [
        "| tea (δ = 2) | **6** | **5.00×** | **40.00** | – | 1 |",
        "| budget | 6.7 | 4.50× | 38.50 | – | 2 |",
    ]


def test_markdown_keeps_a_label_in_its_cell():
    assert "| a \\| b |" in markdown([row("a | b", "peer", psnr=1.0)], ["label"])
