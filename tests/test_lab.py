"""A reader opens an explorer in a real JupyterLab, runs the notebook, moves every control and clicks: the drawing must follow, and be what `render` makes of the state.

Needs Chromium and playwright (`apt install chromium`; `CHROME=/path` names another one); skipped where they are not.
NDET_RECORD=benchmarks/results/explorers.json writes down how long a step takes and how much memory 500 steps leave behind.
"""
import json, os, platform, secrets, shutil, socket, statistics, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
CHROME = os.environ.get("CHROME") or shutil.which("chromium") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not CHROME, reason="no Chromium here")]
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()


TWO = """import torch
from notebook_det import explore
from notebook_det.foundations.structures import Instances
g = torch.Generator().manual_seed(0)
def boxes(n):
    xy = torch.rand(n, 2, generator=g)*180
    return Instances(torch.cat([xy, xy + 10 + torch.rand(n, 2, generator=g)*50], 1), torch.zeros(n, dtype=torch.int64), torch.rand(n, generator=g))
image = torch.randint(0, 255, (3, 240, 240), generator=g, dtype=torch.uint8)
near = (some := boxes(40)).boxes[some.scores.argsort(descending=True, stable=True)]
first, second, many = explore.nms(some, image), explore.nms(boxes(30), image), explore.nms(boxes(500), image, most=500)""", "first", "second", "many"


def write_two(path):
    "A notebook with three explorers, without a detector: ready in a second."
    import nbformat
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in TWO], metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}), path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "URL of a throw-away JupyterLab that serves a copy of the explorers (autosave must not touch the checkout)."
    d = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT/"nbs/15_explore", d/"nbs/15_explore", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    write_two(d/"nbs/15_explore/two.ipynb")
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
    nothing_wrong(page)


def nothing_wrong(page):
    bad = page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type="application/vnd.jupyter.stderr"]')
    assert bad.count() == 0, bad.first.inner_text()


def ask(page, code):
    "Run code in the notebook's kernel; returns what it printed."
    return page.evaluate("""async code => {
        const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
        const future = kernel.requestExecute({code, store_history: false}); let out = '';
        future.onIOPub = m => { if (m.header.msg_type === 'stream') out += m.content.text; if (m.header.msg_type === 'error') throw new Error(m.content.evalue); };
        const reply = await future.done;
        if (reply.content.status !== 'ok') throw new Error(reply.content.ename + ': ' + reply.content.evalue);
        return out }""", code)


def ask_json(page, value): return json.loads(ask(page, f"import json; print(json.dumps({value}))"))


def explorer(page, n=-1):
    "A widget of the notebook, on the screen (JupyterLab draws only what is seen)."
    page.wait_for_selector(".ndet-explorer", state="attached")
    box = page.locator(".ndet-explorer").nth(n) if n >= 0 else page.locator(".ndet-explorer").last
    box.scroll_into_view_if_needed()
    return box


SHEETS = "const h = [...e.querySelectorAll('.widget-html-content')];"


def same(page, box, name="widget", timeout=20_000):
    "Wait until what is on the screen is what `render` makes, in Python, of the state that the widget is in."
    below, above = ask_json(page, f"__import__('notebook_det.explore.shell').explore.shell.sheets(str({name}.render(**{name}.state())))")
    page.wait_for_function("([e, below, above]) => {" + SHEETS + """ const clean = s => { const t = document.createElement('div'); t.innerHTML = s; return t.innerHTML };
        return h[0].innerHTML === clean(below) && h[1].innerHTML === clean(above) }""", arg=[box.element_handle(), below, above], timeout=timeout)


def state(page, name="widget"): return ask_json(page, f"{name}.state()")


def controls(page, name="widget"): return ask_json(page, f"{{k: [type(w).__name__, w.description] for k, w in {name}.controls.items()}}")


def move(page, box, key, kind, label, mouse, name="widget"):
    "Move one control by hand; its value must change in Python, and nobody else's."
    before = state(page, name)
    row = box.locator(".jupyter-widgets", has=page.locator(f'.widget-label:text-is("{label}")')).last if kind != "Checkbox" else box.locator(".widget-checkbox", has_text=label)
    if kind == "Checkbox":
        if mouse: row.locator("input").click()
        else: row.locator("input").focus(); page.keyboard.press("Space")
    elif kind == "Dropdown":
        select = row.locator("select"); at = select.evaluate("e => [e.selectedIndex, e.length]")
        if at[1] < 2: return None
        if mouse: select.select_option(index=(at[0] + 1) % at[1])
        else: select.focus(); page.keyboard.press("ArrowRight" if at[0] + 1 < at[1] else "ArrowLeft")      # up and down go to other cells
    else:
        handle = row.locator(".noUi-handle"); now, low, high = (float(handle.get_attribute(f"aria-{k}")) for k in ("valuenow", "valuemin", "valuemax"))
        if low == high: return None
        if mouse:
            track = row.locator(".noUi-base").bounding_box(); share = .8 if (now - low)/(high - low) < .5 else .2
            page.mouse.click(track["x"] + share*track["width"], track["y"] + track["height"]/2)
        else: handle.focus(); page.keyboard.press("ArrowRight" if now < high else "ArrowLeft")
    for _ in range(50):
        after = state(page, name)
        if after != before: break
        time.sleep(.05)
    assert [k for k in after if after[k] != before[k]] == [key], f"{label}: {before} → {after}"
    return after[key]


def drive(page, box, name="widget", both=False):
    "Every control, by keyboard and mouse in turn (or both); the drawing equals `render(state)` after each."
    moved = []
    for i, (key, (kind, label)) in enumerate(controls(page, name).items()):
        for mouse in (False, True) if both else (bool(i % 2),):
            if move(page, box, key, kind, label, mouse, name) is not None: moved.append(key); same(page, box, name)
    return moved


def click(page, box, x, y):
    "A mouse click at a point of the picture, found on the screen by the rectangle that is drawn around it."
    at = page.evaluate("([e, x, y]) => {" + SHEETS + """ const near = [...h[1].querySelectorAll('rect[vector-effect]')].filter(r => { const b = k => r[k].baseVal.value;
            return Math.hypot(b('x') + b('width')/2 - x, b('y') + b('height')/2 - y) < .2 });
        near[0].scrollIntoView({block: 'center'}); const r = near[0].getBoundingClientRect();
        return [r.left + r.width/2, r.top + r.height/2, r.width/near[0].width.baseVal.value] }""", [box.element_handle(), x, y])
    page.mouse.click(*at[:2])
    return at[2]                                                       # pixels of the screen per pixel of the picture


MIDDLE = """
def middles(boxes): return [((b[0] + b[2])/2, (b[1] + b[3])/2) for b in [[float(v) for v in b] for b in boxes]]
from notebook_det.explore.shell import under
def pickable(boxes): return next((i, *p) for i, p in enumerate(middles(boxes)) if under(boxes, *p) == i)      # a box that is the smallest around its own middle
"""
PICKS = {   # notebook → (controls to set before, expression: what a click must pick; its first three: index, x, y; the names of the controls that must then hold it)
    "01_anchors": ("view='cell', level=1, row=0, col=0, anchor=-1", "[0, *middles(scene.objects.boxes)[0]]", None),
    "02_proposals": ("step='suppressed', top=5, picked=-1", "pickable(torch.cat([scene.steps['suppressed'].boxes[strongest(scene, 'suppressed', 5)], scene.objects.boxes]))", "picked"),
    "03_assignment": ("picked=-1", "pickable(scene.target.boxes)", "picked"),
    "04_nms": ("picked=-1, step=0", "pickable(scene.classes[widget.state()['label']].boxes)", "picked"),
    "05_roi_align": ("index=0, zoom=1.", "[0, *middles(scene.boxes)[0]]", "index"),
    "06_masks": ("index=0, shift=0., grow=0.", "[0, *middles(scene.target.boxes)[0]]", "index"),
    "07_losses": ("picked=-1, top=20", "pickable(scene.levels[widget.state()['level']][dearest(scene, scene.shares(loss_of(scene, *[widget.state()[k] for k in ('kind', 'gamma', 'alpha')])), widget.state()['level'], 20)])", "picked"),
    "09_errors": ("picked=-1, number=0, label='all', kind='missed', score=.3", "pickable(boxes_of(real, real.images('missed')[0], *items(real, real.images('missed')[0], 'missed', .3)))", "picked")}


def pick(page, box, notebook):
    "A click picks what it should: the state says so, and the drawing follows. Returns the scale of the picture on the screen."
    before, code, holds = PICKS[notebook]
    ask(page, f"widget.set({before})\n" + MIDDLE); same(page, box)
    i, x, y = ask_json(page, code)
    was = state(page)
    scale = click(page, box, x, y)
    for _ in range(60):
        now = state(page)
        if now != was or holds == "index": break
        time.sleep(.05)
    if holds: assert now[holds] == i, (i, now)
    else: assert (now["row"], now["col"]) == (round(y/8), round(x/8)) != (0, 0), (x, y, now)       # anchors of level 1: every 8 pixels
    same(page, box)
    return scale


@pytest.mark.parametrize("notebook", ["01_anchors", "02_proposals", "03_assignment", "04_nms", "05_roi_align", "06_masks", "07_losses", "08_pipeline", "09_errors"])
def test_explorer(lab, page, tmp_path, notebook):
    "The notebook runs; each control moves, by hand, and the drawing is what `render` makes of the state; a click picks what is under the mouse."
    start = time.perf_counter()
    run_all(page, lab(f"{notebook}.ipynb"))
    ran, box = time.perf_counter() - start, explorer(page)
    same(page, box)                                                        # where the notebook left it
    moved = drive(page, box, both=notebook == "09_errors")
    assert set(moved) == {k for k, (low, high) in ask_json(page, "{k: (0, len(w.options) - 1) if hasattr(w, 'options') else (getattr(w, 'min', 0), getattr(w, 'max', 1)) for k, w in widget.controls.items()}").items() if low < high}
    if notebook in PICKS: pick(page, box, notebook)
    if notebook == "08_pipeline":                                          # a frame of the strip opens
        ask(page, "widget.set(step=-1)"); same(page, box); box.locator("[data-set]").nth(1).click()
        page.wait_for_function("e => e.querySelectorAll('[data-set]').length === 1", arg=box.element_handle()); assert state(page)["step"] == 1; same(page, box)
    if notebook == "09_errors": bars_open(page, box)
    page.screenshot(path=os.path.join(os.environ.get("LAB_SHOTS", tmp_path), f"{notebook}.png"))
    nothing_wrong(page)
    print(f"{notebook}: ran in {ran:.0f} s, driven in {time.perf_counter() - start - ran:.0f} s, {len(moved)} moves")


def bars_open(page, box):
    "A click on the bar of each kind opens its images; a click on a cell of the matrix those of that confusion."
    for kind in ask_json(page, "[k for k in ('class', 'location', 'both', 'duplicate', 'background', 'missed') if real.images(k)]"):
        box.locator("[data-set]", has_text=kind).first.click()
        page.wait_for_function("([e, k]) => e.innerHTML.includes('with “' + k + '”')", arg=[box.element_handle(), kind]); assert state(page)["kind"] == kind; same(page, box)
    box.locator("[data-set]:has(title)").first.click(); same(page, box)
    assert state(page)["kind"] in ("class", "missed", "background") and state(page)["label"] != "all"


def walk(page, box, label, steps, pause=0):
    "Moves a slider by key so many times, each time waiting for the new drawing; returns milliseconds of each step, from the key to the end of the frame that shows it."
    return page.evaluate("async ([e, label, n, pause]) => {" + SHEETS + """
        const slider = [...e.querySelectorAll('.widget-slider')].find(s => s.querySelector('.widget-label')?.textContent === label), handle = slider.querySelector('.noUi-handle'), out = [];
        let key = 'ArrowRight';
        for (let i = 0; i < n; i++) {
            if (+handle.getAttribute('aria-valuenow') >= +handle.getAttribute('aria-valuemax')) key = 'ArrowLeft';
            if (+handle.getAttribute('aria-valuenow') <= +handle.getAttribute('aria-valuemin')) key = 'ArrowRight';
            const start = performance.now();
            await new Promise((done, fail) => {
                const watch = new MutationObserver(() => { watch.disconnect(); clearTimeout(late); done() });
                const late = setTimeout(() => { watch.disconnect(); fail(new Error('no new drawing after step ' + i)) }, 20000);
                watch.observe(h[1], {childList: true, subtree: true});
                handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})) });
            await new Promise(requestAnimationFrame); await new Promise(done => setTimeout(done));      // the second comes when the frame is painted
            out.push(performance.now() - start); if (pause) await new Promise(done => setTimeout(done, pause)) }
        return out }""", [box.element_handle(), label, steps, pause])


def memory(page, cdp):
    "Megabytes: of the kernel, of the page's objects."
    cdp.send("HeapProfiler.collectGarbage")
    heap = next(m["value"] for m in cdp.send("Performance.getMetrics")["metrics"] if m["name"] == "JSHeapUsedSize")
    return float(ask(page, "import gc, os; gc.collect(); print(int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6)")), heap/1e6


def record(**numbers):
    "Into the file that NDET_RECORD names, if any."
    if not (file := os.environ.get("NDET_RECORD")): return
    import ipywidgets, jupyterlab, torch
    cpu = next((l.split(":", 1)[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    browser = subprocess.run([CHROME, "--version"], capture_output=True, text=True).stdout.strip()
    Path(file).write_text(json.dumps(dict(command=f"NDET_RECORD={file} python -m pytest -n 0 tests/test_lab.py -k two_explorers", what="a key on a slider of explore.nms, to the end of the frame that shows the new drawing",
        machine=dict(cpu=cpu, cores=os.cpu_count(), system=f"{platform.system()} {platform.machine()}"), versions=dict(python=platform.python_version(), torch=torch.__version__, jupyterlab=jupyterlab.__version__, ipywidgets=ipywidgets.__version__, browser=browser), **numbers), indent=1) + "\n", encoding="utf-8")


def test_two_explorers_speed_and_memory(lab, page):
    "Side by side without disturbing each other; a click on a picture that the browser has shrunk; a step with 500 boxes; 500 steps; and the test fails where the observers are cut."
    run_all(page, lab("two.ipynb"))
    a, b, many = (explorer(page, i) for i in range(3))
    cdp = page.context.new_cdp_session(page); cdp.send("Performance.enable")
    same(page, a, "first"); same(page, b, "second")
    still, shown = state(page, "second"), b.inner_html()
    move(page, a, "step", "IntSlider", "step", False, "first"); same(page, a, "first")
    assert state(page, "second") == still and b.inner_html() == shown                       # … and the other one is untouched

    page.set_viewport_size(dict(width=760, height=1100))
    ask(page, MIDDLE + "from notebook_det.explore.nms import NmsScene\nfirst.set(picked=-1, step=0)"); same(page, a, "first")
    i, x, y = ask_json(page, "next((i, *p) for i, p in enumerate(middles(near)) if under(near, *p) == i)")
    a.scroll_into_view_if_needed(); scale = click(page, a, x, y)
    for _ in range(60):
        if state(page, "first")["picked"] >= 0: break
        time.sleep(.05)
    assert state(page, "first")["picked"] == i and scale < 2 < 640/240; same(page, a, "first")
    page.set_viewport_size(dict(width=1200, height=1100))

    many.scroll_into_view_if_needed(); same(page, many, "many"); walk(page, many, "threshold", 3)
    cpu, times = float(ask(page, "import time; print(time.process_time())")), walk(page, many, "threshold", 24, pause=150)
    cpu = float(ask(page, "print(time.process_time())")) - cpu
    drawn = many.locator("rect[vector-effect]").count()
    print(f"one step with {drawn} boxes: {statistics.median(times):.0f} ms at the median of {len(times)} ({min(times):.0f} … {max(times):.0f}), {1000*cpu/len(times):.0f} ms of CPU in the kernel")
    assert drawn >= 500 and statistics.median(times) < 1000; same(page, many, "many")

    found = dict(boxes=drawn, steps=len(times), step_ms_median=round(statistics.median(times)), step_ms_min=round(min(times)), step_ms_max=round(max(times)), kernel_cpu_ms=round(1000*cpu/len(times)))

    a.scroll_into_view_if_needed(); walk(page, a, "threshold", 20)
    kernel, heap = memory(page, cdp)
    start = time.perf_counter(); walk(page, a, "threshold", 500)
    kernel2, heap2 = memory(page, cdp)
    print(f"500 steps in {time.perf_counter() - start:.0f} s: kernel {kernel:.0f} → {kernel2:.0f} MB, objects of the page {heap:.1f} → {heap2:.1f} MB")
    assert kernel2 - kernel < 20 and heap2 - heap < 10; same(page, a, "first")
    record(**found, memory_after_500_steps=dict(kernel_mb=[round(kernel), round(kernel2)], page_objects_mb=[round(heap, 1), round(heap2, 1)]))

    ask(page, "for w in second.controls.values(): w.unobserve_all()")                       # the observers are cut …
    b.scroll_into_view_if_needed()
    with pytest.raises(sync_api.TimeoutError): move(page, b, "step", "IntSlider", "step", False, "second"); same(page, b, "second", timeout=3000)   # … and driving fails
    nothing_wrong(page)


def test_a_page_without_code(page, tmp_path):
    "The same widgets in voila: a slider and a click redraw."
    pytest.importorskip("voila", reason="voila is not installed")
    write_two(tmp_path/"two.ipynb")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env, log = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "IN_TEST": "1"}, open(tmp_path/"voila.log", "w")
    p = subprocess.Popen([sys.executable, "-m", "voila", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1", str(tmp_path/"two.ipynb")], env=env, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0: break
            assert p.poll() is None, (tmp_path/"voila.log").read_text()[-2000:]
            time.sleep(.2)
        page.goto(f"http://127.0.0.1:{port}/"); page.wait_for_selector(".ndet-explorer svg .photo")
        box = page.locator(".ndet-explorer").first
        assert walk(page, box, "step", 3)
        at = box.locator("g.negative rect").first.evaluate("e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); return [r.left + r.width/2, r.top + r.height/2] }")
        assert box.locator("g.chosen").count() == 0
        page.mouse.click(*at); page.wait_for_function("e => e.querySelector('g.chosen')", arg=box.element_handle())
    finally: p.terminate(); p.wait(60); log.close()
