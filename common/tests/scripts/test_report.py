"""`scripts/report/report.py` as a program on toy rows; the page in a real browser, where one is installed."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from ertacache import UserError
from ertacache.evaluation.report import sections
from ertacache.evaluation.rows import read_source
from ertacache.evaluation.table import COLUMNS
from helpers import row

PROMPTS = ["a red <b>square</b>", "a blue square"]
CHROME = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
CHROME += "--disable-component-update --disable-sync --window-size=1400,900 --autoplay-policy=no-user-gesture-required"


def image(grey, prompt):
    frame = np.full((32, 32, 3), grey, np.uint8)
    frame[8:24, 8:24] = [(200, 0, 0), (0, 0, 200)][prompt]
    return frame


def save_samples(folder, name, grey, video):
    names = [f"{name}-{i}{'.mp4' if video else '.png'}" for i in range(len(PROMPTS))]
    for i, file in enumerate(names):
        if video:
            frames = [np.roll(image(grey, i), t, axis=1) for t in range(8)]
            imageio.mimwrite(folder / file, frames, fps=8, macro_block_size=2)
        else:
            imageio.imwrite(folder / file, image(grey, i))
    return names


def write_rows(folder, name, video=False):
    """At 2× our plan leads, at 4× the peer does; a slow one is not ranked."""
    timeline = {"sigmas": np.linspace(1, 0, 13).tolist(), "computed": [0, 1, 4, 6, 8, 10]}
    timeline["error"] = [0.0, 0.001, 0.002, 0.003, 0.004, 0.005]
    rows = [
        row(name, "none", "none", None, 1.0, None),
        row(name, "budget (H = 3)", "budget", 2, 2.0, 70.0, timeline=timeline),
        row(name, "budget (H = 3)", "budget", 4, 4.0, 40.0, timeline={**timeline, "error": None}),
        row(name, "tea|cache (δ = 0.1)", "peer", 2, 2.1, 50.0),
        row(name, "tea|cache (δ = 0.4)", "peer", 4, 4.2, 45.0),
        row(name, "sloth (N = 2)", "peer", 4, 1.5, 60.0),
        row(name, "ertacache (λ = 0.1)", "ertacache", None, 1.5, 58.0),
    ]
    if not video:
        rows.append(row(name, "fewer-steps (6)", "steps", 2, 2.0, 35.04))
    for number, grey in {0: 90, 1: 94, 2: 110, 4: 150}.items():
        rows[number]["samples"] = save_samples(folder, f"{name}-{number}", grey, video)
        rows[number]["sample_prompts"] = PROMPTS
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


def report(*arguments, cwd=None):
    command = [sys.executable, str(ROOT / "scripts" / "report" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=cwd)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of report.html and tables.md of a image model and a video model."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    folder = tmp_path_factory.mktemp("report")
    files = [write_rows(folder, "Images"), write_rows(folder, "Videos", video=True)]
    title = "Numbers & <places>"
    beside = ("--markdown", folder / "tables.md", "--image", folder / "psnr.png")
    done = report(*files, "--out", folder / "report.html", "--title", title, *beside)
    assert done.returncode == 0, done.stderr
    assert "15 rows of 2 models" in done.stdout
    return folder


@pytest.mark.slow
def test_the_page_is_one_file_that_shows_every_row(made):
    page = (made / "report.html").read_text()
    assert len(page) < 3e6 and "<h1>Numbers &amp; &lt;places&gt;</h1>" in page and "<b>square" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "http" not in policy
    without_names = page.replace("http://www.w3.org/", "")
    assert "http://" not in without_names and "https://" not in without_names
    assert page.count("<strong>70.00</strong>") == 2 and page.count("<strong>45.00</strong>") == 2
    assert "<strong>60.00</strong>" not in page and page.count("too slow: 1.50×") == 2
    for words in ("SHA-256", "toy machine", "2026-01-02", "7 to 8", "torch 2.0", "guidance 3.5", "LPIPS", "λ = 0.1"):
        assert words in page, words


def test_the_rows_can_be_taken_back_out(made):
    embedded = re.search(r'href="data:application/json;base64,([^"]+)"', (made / "report.html").read_text()).group(1)
    rows = json.loads(base64.b64decode(embedded))
    assert [r["psnr"] for r in rows][:4] == [None, 70.0, 40.0, 50.0] and str(made) not in json.dumps(rows)


def test_markdown_tables(made):
    tables = (made / "tables.md").read_text()
    assert tables.count("\n### 2×\n") == tables.count("\n### 4×\n") == 2 and tables.count("\n## Images, demo\n") == 1
    assert tables.startswith("## Who is first\n")
    assert "| Images | 2× | PSNR | budget (H = 3) | 70.00 | 1 of 3 | +20.00 dB | +20.00 dB |" in tables
    assert "| Videos | 4× | PSNR | tea\\|cache (δ = 0.4) | 45.00 | 2 of 2 | −5.00 dB | −5.00 dB |" in tables
    head = "| budget (H = 3) | **6** | **2.00×**"
    assert head not in tables and "| budget (H = 3) | 6 | 2.00× | 1.80× | 1.60× | **70.00** |" in tables
    assert "| tea\\|cache (δ = 0.4) | **2.9** | **4.20×** | **3.78×** | **3.36×** | **45.00** |" in tables
    assert re.search(r"\| sloth \(N = 2\) \| 8 \|.*\| 60.00 \|.*\| – \|\n", tables)


def test_a_model_with_fewer_steps_at_2x_says_how_hard_it_is(made):
    for file, words in (("report.html", "steps at 2×) reach 35.0 dB;"), ("tables.md", "steps at 2× reach 35.0 dB.")):
        assert (made / file).read_text().count("How hard it is") == 1 and words in (made / file).read_text(), file


def test_the_overview_has_a_panel_a_model(made):
    overview = Image.open(made / "psnr.png")
    assert overview.size == (2 * 407, 396) and overview.getpixel((1, 1))[:3] == (255, 255, 255)
    colours = {pixel[:3] for _, pixel in overview.getcolors(1 << 20)}
    assert {(0x0B, 0x5F, 0xD0), (0x9A, 0x9A, 0x9A)} <= colours  # budget plans and other caches


def changed(rows, number, **values):
    return [{**r, **values} if i == number else r for i, r in enumerate(rows)]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: None, "cannot read"),
        (lambda rows: "", "is no JSON"),
        (lambda rows: "{oops", "is no JSON"),
        (lambda rows: [], "holds no list of rows"),
        (lambda rows: [1], "row 1 of"),
        (lambda rows: [{"method": "none"}], "'folder' is missing"),
        (lambda rows: changed(rows, 1, psnr="70"), "row 2 of .*'psnr' is '70', not a finite number or null"),
        (lambda rows: changed(rows, 1, psnr=float("nan")), "'psnr' is nan"),
        (lambda rows: changed(rows, 1, speedup_nfe=None), "'speedup_nfe' is None"),
        (lambda rows: changed(rows, 1, family="none"), "'family' is 'none'"),
        (lambda rows: changed(rows, 1, samples=["gone.png"] * 2), "gone.png is missing: keep the samples"),
        (lambda rows: changed(rows, 1, sample_prompts=[]), "one prompt for each"),
        (lambda rows: changed(rows, 1, samples=2), "'samples' is 2, not a list of texts or null"),
        (lambda rows: changed(rows, 1, timeline={"sigmas": [1, 0]}), "'timeline' needs"),
        (lambda rows: changed(rows, 2, prompts=3), "rows of prompts 2 and of 3 share no table"),
        (lambda rows: changed(rows, 2, settings={"steps": 12, "guidance": 2}), "rows of guidance 3.5 and of 2"),
        (lambda rows: [*rows, rows[1]], "comes twice"),
    ],
)
def test_rows_that_are_refused(tmp_path, spoil, words):
    path = write_rows(tmp_path, "Images")
    rows = spoil(json.loads(path.read_text()))
    path.unlink() if rows is None else path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(UserError, match=words) as caught:
        sections([read_source(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "arguments", "words"),
    [
        ("[{}]", "--out page.html", "row 1 of rows.json: 'folder' is missing"),
        (None, "--out no/page.html", "cannot write no/page.html: name a file in a folder that exists"),
        (None, "--markdown no/tables.md", "cannot write no/tables.md: name a file in a folder that exists"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, rows, arguments, words):
    if rows is not None:  # which are read once there is what to draw with
        pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    write_rows(tmp_path, "rows") if rows is None else (tmp_path / "rows.json").write_text(rows)
    before = sorted(tmp_path.iterdir())
    done = report("rows.json", *arguments.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def browser(made, tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*CHROME.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.get((made / "report.html").as_uri())
    yield opened
    opened.quit()


def until(browser, script, *arguments):
    """The script's value as soon as it is true; it has ten seconds."""
    deadline = time.monotonic() + 10
    while not (value := browser.execute_script(f"return {script}", *arguments)):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return value


def part(browser, room, name):
    return browser.find_elements("css selector", f".compare .{name}")[room]


def choose(browser, room, name, text):
    from selenium.webdriver.support.select import Select

    Select(part(browser, room, name)).select_by_visible_text(text)


@pytest.mark.slow
def test_the_page_opens_without_errors_and_without_a_network(browser, made):
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    page = (made / "report.html").as_uri()
    urls = [request["request"]["url"] for request in sent if request["documentURL"] == page]
    assert page in urls and [url for url in urls if url != page and not url.startswith(("data:", "blob:"))] == []
    blocked = """const done = arguments[0]; fetch("https://example.invalid/").catch(() => {});
        document.addEventListener("securitypolicyviolation", (e) => done(e.effectiveDirective));"""
    assert browser.execute_async_script(blocked) == "connect-src"
    browser.get_log("browser")  # that fetch's own complaint


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_and_widths(browser, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.scrollingElement.scrollWidth <= innerWidth")
    ground, line = browser.execute_script(
        """const path = document.querySelector(".plot svg path[style*='--c0']");
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(path).stroke]"""
    )
    light = {"light": ("rgb(255, 255, 255)", "rgb(10, 82, 190)"), "dark": ("rgb(20, 23, 28)", "rgb(138, 184, 255)")}
    assert (ground, line) == light[scheme]


@pytest.mark.slow
def test_structure_for_those_who_do_not_see(browser):
    unnamed = """[...document.querySelectorAll("svg, img, video, select, input, [role=region]")].filter((e) => !(
        e.getAttribute("aria-label") || e.alt || e.closest("label") || e.closest("[aria-hidden=true]"))).length"""
    assert browser.execute_script(f"return {unnamed}") == 0
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((e) => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))


@pytest.mark.slow
def test_speedup_by_flops_or_by_latency(browser):
    seen = "['flops', 'latency'].map((name) => getComputedStyle(document.querySelector('.grid.' + name)).display)"
    assert browser.execute_script(f"return {seen}") == ["grid", "none"]
    browser.find_element("css selector", "input[value=latency]").click()
    assert browser.execute_script(f"return {seen}") == ["none", "grid"]


@pytest.mark.slow
def test_the_slider_moves_the_border_by_key(browser):
    slider = part(browser, 0, "slider")
    clip = "getComputedStyle(document.querySelector('.stage .uncached')).clipPath"
    before = browser.execute_script(f"return {clip}")
    slider.send_keys("\ue014" * 25)  # arrow right
    assert slider.get_attribute("value") == "75" and browser.execute_script(f"return {clip}") != before
    assert browser.execute_script("return document.querySelector('.stage').style.getPropertyValue('--at')") == "75%"


CORNER = """(() => { const image = document.querySelector('.stage > :not(.uncached)');
    if (!image.complete || !image.naturalWidth) return null;
    const canvas = document.createElement('canvas'), context = canvas.getContext('2d', { willReadFrequently: true });
    context.drawImage(image, 0, 0); return [...context.getImageData(16, 16, 1, 1).data.slice(0, 3),
        context.getImageData(1, 1, 1, 1).data[0]]; })()"""


@pytest.mark.slow
def test_method_speedup_and_prompt_change_the_picture(browser):
    assert until(browser, CORNER) == [200, 0, 0, 94]
    choose(browser, 0, "run", "4× asked, 4.00× reached: budget (H = 3), 40.0 dB")
    assert until(browser, CORNER) == [200, 0, 0, 110]
    choose(browser, 0, "method", "tea|cache")
    assert until(browser, CORNER) == [200, 0, 0, 150]
    choose(browser, 0, "prompt", "a blue square")
    assert until(browser, CORNER) == [0, 0, 200, 150]
    part(browser, 0, "difference").click()
    stage = part(browser, 0, "stage")
    assert "difference" in stage.get_attribute("class")
    assert stage.find_element("css selector", ".uncached").get_attribute("alt") == "uncached: a blue square"


@pytest.mark.slow
def test_videos_play_together(browser):
    videos = "document.querySelectorAll('.stage video')"
    until(
        browser, f"[...{videos}].length === 2 && [...{videos}].every((v) => v.readyState >= 2 && v.videoWidth === 32)"
    )
    until(browser, f"[...{videos}].every((v) => v.currentTime > 0.2 && !v.paused)")
    part(browser, 1, "play").click()
    until(browser, f"[...{videos}].every((v) => v.paused && !v.seeking)")
    apart = browser.execute_script(f"return Math.abs({videos}[0].currentTime - {videos}[1].currentTime)")
    assert apart < 0.125 and part(browser, 1, "play").text == "Play"  # a frame
    assert browser.get_log("browser") == []


# --- scripts/report/remake.py --------------------------------------------------------------------------------------

PAGE = """# Page

## One

Text before.

```sh
printf '| a | b |\\n| --- | --- |\\n| 0 | 0 |\\n\\n| a | b |\\n| --- | --- |\\n| 1 | 2 |\\n\\n*2 captions*\\n'
```

| not measured yet |
| --- |

Text *after*.

## Two

```sh
echo no table here
```

Text.

## Three

```sh
false
```

| a |
| --- |
| kept |
"""


def remake(page, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "report" / "remake.py"), str(page), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_page_gets_the_last_table_that_its_commands_print(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert remake(page, "--only", "ONE,two").returncode == 0
    new = "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n*2 captions*\n"
    assert page.read_text() == PAGE.replace("| not measured yet |\n| --- |\n", new)
    assert remake(page, "--only", "one").returncode == 0
    assert page.read_text() == PAGE.replace("| not measured yet |\n| --- |\n", new)  # the old line went with its table
    listed = remake(page, "--list").stdout
    assert "page.md: One\nprintf" in listed and "Two" not in listed and "page.md: Three\nfalse" in listed


def test_a_page_keeps_its_table_when_a_command_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = remake(page, "--only", "three")
    assert done.returncode == 2 and page.read_text() == PAGE
    assert done.stderr.splitlines()[-1].startswith("error: no table from 'false' (exit code 1)")
    assert remake(tmp_path / "none.md").returncode == 2


# --- scripts/report/overview.py ------------------------------------------------------------------------------------


def test_the_overview_has_the_best_row_of_each_method(tmp_path):
    tail = {"psnr_p10": 38.0, "psnr_worst": 21.0, "below_30db": 0.06}
    worse = {"psnr_p10": 30.0, "psnr_worst": 22.0, "below_30db": 0.0}
    rows = [
        row("ERTACache4FLUX", "none", "none", None, 1.0, None),
        row("ERTACache4FLUX", "budget (H = 5)", "budget", 2.0, 2.0, 70.0, **worse),
        row("ERTACache4FLUX", "ertacache (a)", "ertacache", 2.0, 2.0, 50.0, **tail),
        row("ERTACache4FLUX", "ertacache (b)", "ertacache", 2.0, 1.9, 52.0, **tail),
        row("ERTACache4FLUX", "teacache (1)", "peer", 2.0, 2.1, 40.0, **worse),
        row("ERTACache4FLUX", "magcache (1)", "peer", 2.0, 2.2, 45.0, **worse),
        row("ERTACache4FLUX", "pab (1)", "peer", 2.0, 1.2, 90.0),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, str(ROOT / "scripts" / "report" / "overview.py"), str(tmp_path / "rows.json")]
    quality, latency = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout.splitlines()
        for more in ([], ["--of", "latency"])
    )
    assert quality[0] == "| demo | speed-up | budget plan | threshold plan | best other method | TeaCache |"
    cells = "**70.0 / 30.0 / 22.0 / 0 %** | 52.0 / 38.0 / 21.0 / 6 % | 45.0 / 30.0 / 22.0 / 0 % (magcache)"
    assert quality[2] == f"| FLUX | 2× | {cells} | 40.0 / 30.0 / 22.0 / 0 % |"
    assert latency[2] == "| FLUX | 2× | 1.80× of 2.00× | 1.71× of 1.90× | 1.98× of 2.20× (magcache) | 1.89× of 2.10× |"


# --- scripts/report/hardness.py ------------------------------------------------------------------------------------


def test_hardness_ranks_problems_and_says_where_another_method_leads(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    tail = {"psnr_p10": 30.0, "psnr_worst": 20.0, "latents_below_30db": 0.25}
    for name, fewer, others in (("easy", 45.0, 60.0), ("hard", 20.0, 71.5)):
        rows = [
            row("ERTACache4FLUX", "none", "none", None, 1.0, None),
            row("ERTACache4FLUX", "budget (H = 5)", "budget", 2.0, 2.0, 70.0, **tail),
            row("ERTACache4FLUX", "fewer-steps (6)", "steps", 2.0, 2.0, fewer, **tail),
            row("ERTACache4FLUX", "least-squares (1)", "steps", 2.0, 2.0, others, **tail),
            row("ERTACache4FLUX", "pab (1)", "peer", 2.0, 1.2, 90.0, **tail),
        ]
        rows = [dict.fromkeys(name for _, name, _ in COLUMNS) | values for values in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    command = [sys.executable, str(ROOT / "scripts" / "report" / "hardness.py")]
    written = ["--figure", str(tmp_path / "lead.png"), "--markdown", str(tmp_path / "all.md")]
    done = subprocess.run([*command, str(tmp_path), *written], capture_output=True, text=True, check=True)
    ours, theirs = "70.0 / 30.0 / 25 %", "30.0 / 25 % (least squares per step)"
    hard, easy = done.stdout.splitlines()[2:4]
    assert hard == f"| FLUX | 12 | 3.5 | 20.0 | 2× | {ours} | **71.5 / {theirs}** | −1.5 |"
    assert easy == f"| FLUX | 12 | 3.5 | 45.0 | 2× | **{ours}** | 60.0 / {theirs} | +10.0 |"
    assert Image.open(tmp_path / "lead.png").width > 300
    assert (tmp_path / "all.md").read_text().count("## FLUX, T = 12, guidance 3.5") == 2
    (tmp_path / "none.json").write_text(json.dumps(rows[:2]))
    done = subprocess.run([*command, str(tmp_path / "none.json")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: none.json has no row of fewer steps at 2×: measure it with --methods fewer-steps,…\n"
