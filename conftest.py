"""pytest glue: nbs/**/*.ipynb are tests (the same cells as `nbdev_test` runs), in the processes of pytest, so that torch is imported once in each.

Options: --nbflags "slow gpu" runs cells that bear these flags; --nblimit 240 is the time limit of a notebook in seconds."""
import atexit, os, random, signal, sys, tempfile, threading
from pathlib import Path
import pytest

ROOT = Path(__file__).parent
if str(ROOT) not in sys.path: sys.path.insert(0, str(ROOT))
BOOK_SECONDS = 60      # what a notebook may take; the limit is wider, since machines differ


def cores():
    "Cores that this process may use: affinity and, in a container, its quota."
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max": n = min(n, max(1, int(quota) // int(period)))
    except (OSError, ValueError): pass
    return n


def pytest_addoption(parser):
    parser.addoption("--nbflags", default="", help="space separated flags of notebook cells to run as well (slow gpu)")
    parser.addoption("--nblimit", type=int, default=240, help="seconds a notebook may take")


def pytest_configure(config):
    "More threads than cores make torch crawl; more than four gain nothing on pictures of this size."
    os.environ.setdefault("MPLBACKEND", "agg")
    os.environ.setdefault("NDET_QUIET", "1")
    if getattr(config.option, "dist", "no") != "no" and "PYTEST_XDIST_WORKER" not in os.environ: return   # the one that hands out: its workers would inherit
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, cores()//beside))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    "Processes of `-n auto`: each imports torch and wants some 2 GB."
    return min(4, cores())


def pytest_collect_file(file_path, parent):
    inside = file_path.relative_to(ROOT).parts if file_path.is_relative_to(ROOT) else ()
    if file_path.suffix == ".ipynb" and inside[:1] == ("nbs",) and not any(p.startswith(("_", ".")) for p in inside):
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookItem(pytest.Item):
    def __init__(self, **kw):
        super().__init__(**kw)
        self.add_marker("notebook")

    def runtest(self):
        with unchanged(), limit(self.config.getoption("nblimit")): ok = self.execute()
        if not ok: raise NotebookError(self.name)

    def execute(self):
        from execnb.shell import CaptureShell
        import nbdev.test
        from nbdev.config import get_config
        shells = []
        class Shell(CaptureShell):
            def __init__(self, *a, **k): super().__init__(*a, **k); shells.append(self)
        nbdev.test.CaptureShell = Shell
        try:
            return nbdev.test.test_nb(self.path, skip_flags=get_config(path=ROOT).tst_flags.split(),
                                      force_flags=self.config.getoption("nbflags").split(), basepath=ROOT)[0]
        finally:
            nbdev.test.CaptureShell = CaptureShell
            for o in shells:   # IPython keeps every shell, its tensors too, until exit, and then pays for each
                atexit.unregister(o.atexit_operations)
                if o.history_manager is not None: o.history_manager.end_session()
                o.user_ns.clear()

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, NotebookError): return f"notebook {excinfo.value} failed: its traceback is in the captured stderr below"
        return super().repr_failure(excinfo, style)

    def reportinfo(self): return self.path, 0, str(self.path.relative_to(ROOT))


class NotebookError(Exception): pass
class TooSlow(BaseException): pass   # no `except Exception` in a notebook may swallow it


def registered():
    "What the package's operators point to: a notebook defines them anew, with functions that end with its kernel."
    import importlib, pkgutil
    for room in ("ops", "priors"):   # all of them must be there first, or what a notebook defines would be the first entry
        for m in pkgutil.iter_modules(importlib.import_module(f"notebook_det.{room}").__path__): importlib.import_module(f"notebook_det.{room}.{m.name}")
    from notebook_det.ops import library
    return library.REFERENCES, library.FAKES, library.GRADIENTS


class unchanged:
    "What one notebook sets must not be there for the next one: directory, paths, seeds, threads, plot settings, and no temporary files for anybody."
    def __enter__(self):
        import matplotlib, numpy, torch
        self.old, self.plots = (os.getcwd(), list(sys.path), dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()), matplotlib.rc_context()
        self.plots.__enter__()
        self.operators = [(d, dict(d)) for d in registered()]
        self.tempdir, self.folder = tempfile.tempdir, tempfile.TemporaryDirectory(ignore_cleanup_errors=True)   # what it compiles may stay for others
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir())/f"torchinductor_{os.getuid() if hasattr(os, 'getuid') else 0}"))
        os.environ["TMPDIR"] = tempfile.tempdir = self.folder.name
        random.seed(0); numpy.random.seed(0); torch.manual_seed(0)

    def __exit__(self, *_):
        import matplotlib.pyplot as plt, torch
        plt.close("all"); self.plots.__exit__(None, None, None)
        cwd, path, env, threads, dtype = self.old
        for d, entries in self.operators: d.clear(); d.update(entries)
        os.chdir(cwd); sys.path[:] = path
        os.environ.clear(); os.environ.update(env)
        tempfile.tempdir = self.tempdir; self.folder.cleanup()
        torch.set_num_threads(threads); torch.set_default_dtype(dtype); torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)


class limit:
    "Raise in the main thread when time is up."
    def __init__(self, seconds): self.seconds = seconds if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread() else 0
    def up(self, *_): raise TooSlow(f"the notebook took longer than {self.seconds} s (--nblimit)")
    def __enter__(self):
        if self.seconds: self.old = signal.signal(signal.SIGALRM, self.up); signal.alarm(self.seconds)
    def __exit__(self, *_):
        if self.seconds: signal.alarm(0); signal.signal(signal.SIGALRM, self.old)


def pytest_terminal_summary(terminalreporter):
    took = {r.nodeid.split("::")[0]: r.duration for kind in ("passed", "failed") for r in terminalreporter.getreports(kind) if r.when == "call" and ".ipynb" in r.nodeid}
    slow = sorted(((s, n) for n, s in took.items() if s > BOOK_SECONDS), reverse=True)
    if took: terminalreporter.write_line(f"{len(took)} notebooks in {sum(took.values()):.0f} s"
                                         + ("" if not slow else f"; over the book's {BOOK_SECONDS} s: " + ", ".join(f"{n} {s:.0f} s" for s, n in slow)))
