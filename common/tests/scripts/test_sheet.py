"""`scripts/report/sheet.py` on toy rows: every picture stands where its method and prompt say."""

import numpy as np
import pytest
import sheet
from PIL import Image
from test_report import write_rows

from ertacache import UserError


def made(monkeypatch, rows, out, *flags):
    monkeypatch.setattr("sys.argv", ["sheet.py", str(rows), "--out", str(out), *map(str, flags)])
    sheet.main()
    return np.asarray(Image.open(out))


@pytest.mark.parametrize(
    ("asked", "methods", "greys"), [(2, "none,budget", [90, 94]), (4, "budget,tea|cache", [110, 150])]
)
def test_methods_stand_side_by_side_at_the_asked_speedup(tmp_path, monkeypatch, asked, methods, greys):
    rows = write_rows(tmp_path, "Images")
    page = made(monkeypatch, rows, tmp_path / "page.png", "--methods", methods, "--asked", asked)
    tiles = [page[40, 20 + column * page.shape[1] // 2].tolist() for column in (0, 1)]  # grounds of the first prompt
    assert tiles == [[grey] * 3 for grey in greys]


def test_one_method_makes_a_grid(tmp_path, monkeypatch):
    page = made(monkeypatch, write_rows(tmp_path, "Images"), tmp_path / "grid.png", "--methods", "none", "--count", 2)
    side, gap = sheet.SIDE, sheet.GAP
    assert page.shape[1] == 6 * (side + gap) + gap
    middle = [tuple(page[gap + side // 2, gap + n * (side + gap) + side // 2]) for n in (0, 1)]
    assert middle == [(200, 0, 0), (0, 0, 200)]


@pytest.mark.parametrize(("flags", "words"), [(("--count", 0), "--count 0"), (("--methods", "sloth"), "no row of")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, flags, words):
    with pytest.raises(UserError, match=words):
        made(monkeypatch, write_rows(tmp_path, "Images"), tmp_path / "out.png", *flags)


def test_videos_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a video"):
        made(monkeypatch, write_rows(tmp_path, "Videos", video=True), tmp_path / "out.png")
