"""Rows as Markdown tables for the result pages."""

from ertacache.evaluation import table
from ertacache.evaluation.rows import Row
from helpers import row

ABSENT = dict.fromkeys(Row.__annotations__)


def measured(label, family, asked, speedup, psnr, **values):
    tail = {"psnr_p10": psnr and psnr - 5, "psnr_worst": psnr and psnr - 9, "below_30db": psnr and 0.125}
    tail |= {"latent_psnr": psnr and psnr + 3, "latents_below_30db": psnr and 0.0625}
    return {
        **ABSENT,
        **row("ERTACache4FLUX", label, family, asked, speedup, psnr, **tail),
        "captions": "full",
        **values,
    }


ROWS = [
    measured("none", "none", None, 1.0, None),
    measured("budget (H = 5)", "budget", 2.0, 2.0, 70.25),
    measured("fewer-steps (6)", "steps", 2.0, 2.0, 42.0),
    measured("teacache (δ = 0.1)", "peer", 2.0, 1.7, 80.0),
    measured("budget (H = 3)", "budget", 3.0, 3.0, 60.0),
    measured("fewer-steps (4)", "steps", 3.0, 3.0, 61.0),
]


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_one_line_each():
    head, _, none, budget, *_ = lines(table.one_line_each(ROWS))
    cells = dict(zip(head, budget, strict=True))
    assert cells["PSNR: mean / 10th percentile / worst, dB"] == "70.2 / 65.2 / 61.2"
    assert (cells["below 30 dB"], cells["latents, dB (below 30 dB)"]) == ("12 %", "73.25 (6 %)")
    assert (cells["calls"], cells["FLOPs"], cells["asked"]) == ("6 of 12", "2.00×", "2×")
    assert none[0] == "uncached" and set(none) > {"–"} and "LPIPS" not in head and "CLIP similarity" not in head


def test_by_speedup():
    head, _, twice, thrice = lines(table.by_speedup(ROWS))
    assert head == ["speed-up", "budget plan", "fewer steps", "TeaCache"]
    assert twice == ["2×", "**70.2 / 65.2 / 6 %**", "42.0 / 37.0 / 6 %", "– (1.70×)"]  # too slow to count as first
    assert thrice == ["3×", "60.0 / 55.0 / 6 %", "**61.0 / 56.0 / 6 %**", "–"]


def test_by_speedup_names_what_differs():
    other = [{**r, "captions": "open"} for r in ROWS]
    assert [line[:2] for line in lines(table.by_speedup(ROWS + other))[2:]] == [
        *(["full", "2×"], ["full", "3×"], ["open", "2×"], ["open", "3×"])
    ]
    wan = [{**r, "folder": "ERTACache4Wan2.1"} for r in ROWS]
    assert lines(table.by_speedup(wan + other))[2][:3] == ["Wan2.1", "full", "2×"]


def test_a_threshold_plan_has_a_column_for_each_site():
    sites = [
        measured("ertacache", "ertacache", 2.0, 2.0, 50.0, settings={"site": site}) for site in ("output", "blocks")
    ]
    assert lines(table.by_speedup(sites))[0] == ["speed-up", "threshold plan, output", "threshold plan, blocks"]
