"Object detection you can read: every part of every detector, written, shown and tested in a notebook."
__version__ = "0.1.0"

from importlib import import_module

_NAMES = {"Config": "foundations.recipes", "build": "foundations.recipes", "show": "foundations.recipes", "diff": "foundations.recipes",
          "Images": "foundations.structures", "Instances": "foundations.structures", "Trace": "foundations.structures",
          "CocoDetection": "data.coco", "make_toy": "data.toy", "make_loader": "data.loaders",
          "CocoEvaluator": "evaluation.coco", "evaluate": "evaluation.coco", "Runner": "engine.runner",
          "load": "zoo.predict", "load_checkpoint": "zoo.checkpoints"}     # what users start from, and where it lives
__all__ = [*_NAMES, "zoo"]


def __getattr__(name):
    "Import a room when something in it is asked for: `import notebook_det` alone is quick."
    if name == "zoo": return import_module("notebook_det.zoo")
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"notebook_det.{_NAMES[name]}"), name)


def __dir__(): return sorted({*globals(), *__all__})
