"""A reader queues variants in a real JupyterLab, starts them and watches; the study goes on without the browser and without the kernel."""
import json, os, urllib.request
from urllib.parse import parse_qs, urlsplit
import pytest
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from notebook_det.data.toy import make_toy
from notebook_det.explore.ablation import Study, holder, wait_for
from test_lab import CHROME, ask, ask_json, lab, nothing_wrong, page, run_all      # noqa: F401 (fixtures)

pytestmark = [pytest.mark.lab, pytest.mark.skipif(not CHROME, reason="no Chromium here")]

OPEN = """from notebook_det import explore
from notebook_det.explore.ablation import new_study
from notebook_det.zoo import recipes as zoo
tiny = zoo.recipe("retinanet_mobilenet")
tiny.model = zoo.retinanet(zoo.mobilenet_v2(width=.25, norm_eval=False, norm_grad=True), out_channels=16)
study = new_study({folder!r}, tiny, {train!r}, {images!r}, {train!r}, size=(64, 64), iterations={iterations}, batch=2, seeds=(0,), evaluations=2, pictures=1, device="cpu")"""


def place(lab, name, *cells): # a notebook in the running JupyterLab → its address
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    url = urlsplit(lab(name))
    request = urllib.request.Request(f"{url.scheme}://{url.netloc}/api/contents/nbs/15_explore/{name}?token={parse_qs(url.query)['token'][0]}", method="PUT",
                                     data=json.dumps({"type": "notebook", "content": nb}).encode(), headers={"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).close()
    return lab(name)


@pytest.fixture
def files(tmp_path):
    "Pictures, and a folder for a study whose processes end with the test."
    toy = make_toy(tmp_path/"toy", num_train=4, num_val=1, size=64, seed=1)
    yield dict(folder=str(tmp_path/"study"), train=str(toy.train), images=str(toy.images))
    if (tmp_path/"study/study.json").exists():
        study = Study(tmp_path/"study"); study.stop(now=True)
        assert not study.workers()


def shows(page, box, text, timeout=180_000): # until the widget's picture has this in it
    page.wait_for_function("([e, t]) => e.querySelector('svg')?.outerHTML.includes(t)", arg=[box.element_handle(), text], timeout=timeout)


def tab_to(page, tag, key="Tab"): # as a reader does: until it is reached
    for _ in range(4):
        page.keyboard.press(key)
        if page.evaluate("() => document.activeElement.tagName") == tag: return
    raise AssertionError(f"no {tag} within four presses of {key}")


def test_queue_by_hand_and_see_the_result(lab, page, files, tmp_path):
    run_all(page, place(lab, "queue.ipynb", OPEN.format(**files, iterations=8), "widget = explore.ablation.explore(study, every=.5)\nwidget"))
    box = page.locator(".ndet-study"); box.scroll_into_view_if_needed()
    message = lambda text: page.wait_for_function("([e, t]) => e.querySelector('.ndet-message').innerText.includes(t)", arg=[box.element_handle(), text], timeout=40_000)
    box.locator("input[type=text]").first.click()                                # the filter
    page.keyboard.type("schedule.lr")
    tree = box.locator(".ndet-tree select")
    page.wait_for_function("e => e.options.length === 2", arg=tree.element_handle())
    tree.focus(); page.keyboard.press("End")                                     # by keyboard: the argument itself …
    page.wait_for_function("e => e.innerText.includes('an argument of Schedule') && e.innerText.includes('scale one with the other')", arg=box.element_handle())
    tab_to(page, "INPUT"); page.keyboard.type("fast")                            # … a wrong value …
    tab_to(page, "BUTTON"); page.keyboard.press("Enter"); message("'fast' is not a Python value")
    tab_to(page, "INPUT", "Shift+Tab"); page.keyboard.press("Control+a"); page.keyboard.type(".002; 0.003")      # … and two right ones
    tab_to(page, "BUTTON"); page.keyboard.press("Enter"); message("2 values added")
    box.locator("button", has_text="queue 2 variants").click(); message("3 runs queued")      # by mouse; the base comes along
    shows(page, box, "3 waiting")
    assert [(r.name, r.state) for r in Study(files["folder"]).runs()] == [("base", "waiting"), ("lr=.002", "waiting"), ("lr=0.003", "waiting")]
    box.locator("button", has_text="start").click(); message("started")
    shows(page, box, "3 done")                                                   # nobody has pressed anything: the widget looks by itself
    assert ask_json(page, "str(explore.ablation.render(study, **widget.state())) == widget.picture.value")
    assert box.locator("svg circle").count() == 3
    page.screenshot(path=os.environ.get("LAB_SHOT3", str(tmp_path/"study.png")))
    for view, text in (("curves", "training loss"), ("pictures", "iteration 8"), ("change", "recipe.schedule.lr = 0.003")):
        box.locator("select", has=page.locator("option:text-is('curves')")).select_option(view)
        shows(page, box, text, 20_000)
    box.locator("button", has_text="csv").click(); message("written")
    assert (tmp_path/"study/table.csv").read_text() == Study(files["folder"]).csv()
    nothing_wrong(page)
    ask(page, "widget.close()")
    assert wait_for(lambda: not ask_json(page, "widget.panel.ticker.running"), 20)


def test_it_goes_on_without_browser_and_kernel(lab, page, files, tmp_path):
    cells = OPEN.format(**files, iterations=200), "study.add()\nstudy.start(1)\nrun = study.runs()[0]\nfrom notebook_det.explore.ablation import wait_for\nassert wait_for(lambda: (run.folder/'log.jsonl').exists(), 120)", \
        "view = explore.run.explore(run.folder, every=.3)\nview"
    url = place(lab, "goes_on.ipynb", *cells)
    run_all(page, url)
    box = page.locator(".ndet-run"); box.scroll_into_view_if_needed()
    iteration = "e => Number(/iteration ([\\d,]+) of/.exec(e.querySelector('svg').textContent)?.[1].replace(',', '') ?? -1)"
    page.wait_for_function(f"e => ({iteration})(e) > 0", arg=box.element_handle())
    first = box.evaluate(iteration)
    page.wait_for_function(f"([e, n]) => ({iteration})(e) > n", arg=[box.element_handle(), first])               # it follows
    study = Study(files["folder"]); run = study.runs()[0]
    worker, trainer = holder(study.workers()[0]), holder(run.folder/"lock")
    assert run.state == "running" and worker and trainer
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")        # the kernel is gone …
    page.goto("about:blank")                                                                                     # … and the page
    assert holder(study.workers()[0]) == worker and holder(run.folder/"lock") == trainer and run.state == "running"
    at = run.log()["train"]["iter"][-1]
    assert wait_for(lambda: run.log()["train"]["iter"][-1] > at, 60)                                             # nobody looks, it goes on
    run_all(page, url)
    assert len(study.runs()) == 1 and (run.state == "done" or holder(run.folder/"lock") == trainer)              # the same run, the same process
    box = page.locator(".ndet-run"); box.scroll_into_view_if_needed()
    shows(page, box, "ended")
    assert wait_for(lambda: run.state == "done", 60) and run.result["iterations"] == 200 and "200 of 200" in box.locator("svg").first.text_content()
    assert wait_for(lambda: not ask_json(page, "view.ticker.running"), 20)                                       # a run that has ended is looked at no more
    page.screenshot(path=os.environ.get("LAB_SHOT4", str(tmp_path/"run.png")))
    assert study.wait(60)
