"""A reader opens an explorer in a real JupyterLab, runs the notebook and moves a slider: the drawing must follow.

Needs Chromium and playwright (`apt install chromium`; `CHROME=/path` names another one); skipped where they are not.
"""
import json, os, secrets, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
CHROME = os.environ.get("CHROME") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not CHROME, reason="no Chromium here")]
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "URL of a throw-away JupyterLab that serves a copy of the explorers (autosave must not touch the checkout)."
    d = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT/"nbs/15_explore", d/"nbs/15_explore", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    st = d/"settings/@jupyterlab/apputils-extension"; st.mkdir(parents=True)
    (st/"notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token, log = secrets.token_hex(8), open(d/"lab.log", "w")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
           "JUPYTER_CONFIG_DIR": str(d/"config"), "JUPYTER_DATA_DIR": str(d/"data"), "JUPYTER_RUNTIME_DIR": str(d/"run"),
           "JUPYTERLAB_SETTINGS_DIR": str(d/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(d/"ws"), "IPYTHONDIR": str(d/"ipy")}
    env["IN_TEST"] = "1"                      # nbdev_export at the end of a notebook: not of this copy
    p = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={d}", "--LabApp.expose_app_in_browser=True"], env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).close(); break
            except OSError:
                assert p.poll() is None, (d/"lab.log").read_text()[-2000:]
                time.sleep(.2)
        yield lambda nb: f"http://127.0.0.1:{port}/lab/tree/nbs/15_explore/{nb}?token={token}&reset"
    finally: p.terminate(); p.wait(60); log.close()


@pytest.fixture(scope="module")
def page():
    with sync_api.sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROME, args=FLAGS)
        pg = b.new_page(viewport=dict(width=1200, height=1100)); pg.set_default_timeout(240_000)
        yield pg
        b.close()


def run_all(page, url):
    "Open a notebook and run every cell; nothing may go wrong in any."
    page.goto(url); page.wait_for_selector(".jp-Notebook")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")   # resolves when all have run
    bad = page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')
    assert bad.count() == 0, bad.first.inner_text()


def explorer(page):
    "The notebook's widget, on the screen (JupyterLab draws only what is seen)."
    box = page.locator(".widget-vbox").last
    box.scroll_into_view_if_needed()
    return box


def drawing(box): return box.locator(".widget-html svg").first.evaluate("e => e.outerHTML")


def press(page, box, label, key, times=3, until=None):
    "Move a slider by keyboard and wait until the drawing is another one (and says `until`); returns (before, after, milliseconds)."
    before = drawing(box)
    slider = box.locator(".widget-slider", has=page.locator(f'.widget-label:text-is("{label}")')).first
    slider.locator(".noUi-handle").focus()
    start = time.perf_counter()
    for _ in range(times): page.keyboard.press(key)
    page.wait_for_function("([e, b, t]) => { const now = e.querySelector('.widget-html svg').outerHTML; return now !== b && now.includes(t) }",
                           arg=[box.element_handle(), before, until or ""], timeout=30_000)
    return before, drawing(box), 1000 * (time.perf_counter() - start)


def test_anchor_explorer(lab, page, tmp_path):
    run_all(page, lab("01_anchors.ipynb"))
    box = explorer(page)
    assert "stride 16" in drawing(box) or "the best one of each object" in drawing(box)      # where the notebook left it
    box.locator("select").first.select_option("cell")
    page.wait_for_function("e => e.querySelector('.widget-html svg').outerHTML.includes('cell (')", arg=box.element_handle())
    before, _, ms = press(page, box, "level", "ArrowRight", 1, until="level 3, stride 32")
    assert "level 3" not in before
    press(page, box, "level", "ArrowLeft", 2)
    press(page, box, "pos iou", "ArrowLeft", 6)
    page.screenshot(path=os.environ.get("LAB_SHOT", str(tmp_path/"anchors.png")))
    print(f"one key press to a new drawing: {ms:.0f} ms")


def test_proposal_explorer(lab, page, tmp_path):
    run_all(page, lab("02_proposals.ipynb"))
    box = explorer(page)
    before = drawing(box)
    box.locator("select").first.select_option("top-k")
    page.wait_for_function("([e, b]) => e.querySelector('.widget-html svg').outerHTML !== b", arg=[box.element_handle(), before])
    assert "after “top-k”" in drawing(box)
    press(page, box, "top", "ArrowRight", 2, until="the 50 strongest")
    press(page, box, "iou", "ArrowRight", 4)
    page.screenshot(path=os.environ.get("LAB_SHOT2", str(tmp_path/"proposals.png")))


@pytest.mark.parametrize("notebook,label,key,says", [("03_assignment.ipynb", "pos iou", "ArrowRight", "positive"), ("04_nms.ipynb", "step", "ArrowRight", "turn 4 of"),
                         ("05_roi_align.ipynb", "size", "ArrowRight", "4×4 bins"), ("06_masks.ipynb", "threshold", "ArrowLeft", "at 0.45"),
                         ("07_losses.ipynb", "gamma", "ArrowLeft", "γ 4.75"), ("08_pipeline.ipynb", "seed", "ArrowRight", "px")])
def test_slider(lab, page, tmp_path, notebook, label, key, says):
    "The notebook runs, one press of a key moves the slider, and the drawing says so."
    run_all(page, lab(notebook))
    box = explorer(page)
    if notebook == "03_assignment.ipynb": box.locator("select").nth(1).select_option("RetinaNet")     # a rule that knows overlaps
    if notebook == "03_assignment.ipynb": page.wait_for_function("e => !e.querySelector('.widget-html svg').outerHTML.includes('FSAF')", arg=box.element_handle())
    *_, ms = press(page, box, label, key, 1, until=says)
    page.screenshot(path=str(tmp_path/f"{notebook}.png"))
    print(f"{notebook}: one key press to a new drawing in {ms:.0f} ms")
