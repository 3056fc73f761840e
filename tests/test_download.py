"""Published weights over a bad line: a whole detector from a server that cuts, falls silent and is killed, from the cache and from a folder."""
import hashlib, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, torch
from notebook_det.engine.checkpoint import CheckpointError
from notebook_det.foundations.recipes import build
from notebook_det.zoo import cli, download, parts, predict, recipes

ROOT, NAME = Path(__file__).parents[1], "ssdlite_mobilenetv2-scratch_8xb24-600e_coco"


class Server(ThreadingHTTPServer):
    "Serves one file; `faults` are used up one per request: cut (after a third), silent (after a third), slow."
    daemon_threads = True
    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.faults, self.asked, self.over = content, [], [], threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        s = self.server
        fault, start = s.faults.pop(0) if s.faults else "", int((self.headers["Range"] or "bytes=0-")[6:-1])
        s.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(s.content) - start))
        if start: self.send_header("Content-Range", f"bytes {start}-{len(s.content) - 1}/{len(s.content)}")
        self.end_headers()
        body = s.content[start:]
        try:
            self.wfile.write(body[:len(body)//3] if fault in ("cut", "silent") else body[:1000] if fault == "slow" else body)
            if fault == "slow": time.sleep(1); self.wfile.write(body[1000:])
            if fault == "silent": s.over.wait(20)
        except OSError: pass
        self.close_connection = True


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A detector's weights under a name that promises their fingerprint."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    model = build(recipes.recipe(NAME).model)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, folder/"w.pth")
    file = folder/f"ssdlite-{hashlib.sha256((folder/'w.pth').read_bytes()).hexdigest()[:8]}.pth"
    return (folder/"w.pth").rename(file), model


@pytest.fixture
def server(weights, monkeypatch, tmp_path):
    "The table points to a server on this machine; the cache is empty."
    s = Server(weights[0].read_bytes())
    row = parts.find_row(NAME) | dict(weights=f"http://127.0.0.1:{s.server_port}/{weights[0].name}")
    for room in (download, predict): monkeypatch.setattr(room, "find_row", lambda name: row if name == NAME else None)
    monkeypatch.setattr(predict, "table", lambda: [row])
    monkeypatch.setenv("NOTEBOOK_DET_CACHE", str(tmp_path/"cache"))
    yield s
    s.over.set(); s.shutdown(); s.server_close()


def test_a_detector_by_its_name(server, weights, tmp_path):
    "Cut twice on its way, whole in the end; afterwards neither the server nor a second request is needed."
    server.faults[:] = ["cut", "cut"]
    model = predict.load(NAME)
    assert len(server.asked) == 3 and 0 == server.asked[0] < server.asked[1] < server.asked[2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights[1].state_dict().values()))
    server.shutdown(); server.server_close()
    assert predict.category_ids(NAME, predict.load(NAME))[-1] == 90 and len(server.asked) == 3        # from the cache: COCO's numbers
    assert not predict.load(NAME, folder=weights[0].parent).training                                  # … and from a folder


def test_no_network(server, weights, tmp_path, monkeypatch):
    "One sentence with the address, the file and what to type; with `--from` nobody asks the network."
    server.shutdown(); server.server_close()
    monkeypatch.setattr(download, "persist", lambda *a, f=download.persist: f(*a[:2], 2, .5, .01))
    with pytest.raises(CheckpointError, match=rf"(?s)no way to 127.0.0.1.*Download http://127.*{weights[0].name}.*--from FOLDER"): predict.load(NAME)
    assert not list((tmp_path/"cache").glob("[!.]*"))
    from PIL import Image
    Image.new("RGB", (64, 48)).save(tmp_path/"a.png")
    cli.call(cli.predict, NAME, tmp_path/"a.png", "--from", weights[0].parent, "--out", tmp_path/"out")
    assert (tmp_path/"out/detections.json").exists()
    with pytest.raises(SystemExit, match="ndet-predict: .*has no ssdlite-.*--from FOLDER"): cli.call(cli.predict, NAME, tmp_path/"a.png", "--from", tmp_path)


FETCH = "import sys; from notebook_det.zoo.download import download; download(sys.argv[1], sys.argv[2], timeout=10, pause=.01)"
def fetch(server, file, target): return subprocess.Popen([sys.executable, "-c", FETCH, f"http://127.0.0.1:{server.server_port}/{file.name}", str(target)], cwd=ROOT)


def test_killed_in_the_middle(server, weights, tmp_path):
    "What a killed process has brought is kept, and the next one asks for the rest."
    server.faults[:] = ["silent"]
    target = tmp_path/weights[0].name
    first = fetch(server, weights[0], target)
    part, third = target.with_name(target.name + ".part"), len(server.content)//3
    deadline = time.time() + 60
    while not (part.exists() and part.stat().st_size >= third // 2) and time.time() < deadline: time.sleep(.05)
    first.kill(); first.wait()
    kept = part.stat().st_size
    assert 0 < kept <= third and not target.exists()
    assert fetch(server, weights[0], target).wait(60) == 0
    assert target.read_bytes() == server.content and server.asked == [0, kept] and not part.exists()


def test_two_processes_want_the_same(server, weights, tmp_path):
    "One fetches, the other waits and finds it."
    server.faults[:] = ["slow"]
    both = [fetch(server, weights[0], tmp_path/weights[0].name) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0] and server.asked == [0]
