"Explorers, each in one line: `from notebook_det import explore; explore.anchors(model, image, target)`."
from importlib import import_module

__all__ = ["anchors", "proposals", "assignment", "nms", "roi_align", "masks", "losses", "pipeline", "errors", "ablation", "run"]


def __getattr__(name):
    "Import an explorer when it is asked for."
    if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__(): return sorted({*globals(), *__all__})
