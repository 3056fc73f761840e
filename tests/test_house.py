"Arrows only point down: no room of the package imports from a room beside or above it (DESIGN 2)."
from pathlib import Path
import pytest
import notebook_det
from notebook_det.foundations.house import BELOW, arrows, faults, reachable

HOME = Path(notebook_det.__file__).parent
MODELS = {"backbones", "necks", "dense_heads", "roi_heads", "detectors"}


def test_every_arrow_points_down(): assert faults(arrows(HOME)) == []


def test_every_room_has_its_place(): assert {p.parent.name for p in HOME.glob("*/__init__.py")} <= set(BELOW)


def test_the_promises_in_words():
    assert reachable("engine") == {"engine", "foundations"}
    assert reachable("data") == {"data", "ops", "foundations"} and reachable("evaluation") == {"evaluation", "ops", "foundations"}
    for room in MODELS | {"priors", "losses", "layers", "ops"}: assert not reachable(room) & {"data", "engine", "evaluation", "zoo", "explore"}


def package(folder, **modules): # a package with a file per `room__module`
    for name, body in {"__init__": "", **modules}.items():
        path = folder/"tiny"/(name.replace("__", "/", 1) if name != "__init__" else name)
        path = path.with_suffix(".py"); path.parent.mkdir(parents=True, exist_ok=True); path.write_text(body)
    return folder/"tiny"


def test_a_clean_package_passes(tmp_path):
    home = package(tmp_path, ops__nms="import torch\nfrom ..foundations.draw import show\nfrom .boxes import iou\n", detectors__base="from tiny.ops import nms\nimport tiny.losses.masks\n", __init__="from .zoo import recipe\n")
    assert faults(arrows(home)) == []


@pytest.mark.parametrize("line", ["from ..zoo.recipes import x", "from .. import zoo", "import tiny.zoo", "import tiny.zoo.recipes as r", "from tiny.zoo import recipes", "from tiny import zoo",
                                  "def late():\n    from ..zoo import recipes", "if TYPE_CHECKING:\n    from tiny.zoo import recipes", "try:\n    import tiny.zoo\nexcept ImportError: pass"])
def test_an_import_from_above_is_found_however_it_is_written(tmp_path, line):
    found = faults(arrows(package(tmp_path, engine__runner=f"import math\n{line}\n")))
    assert len(found) == 1 and found[0].startswith("engine.runner, line ") and "engine imports zoo" in found[0]


@pytest.mark.parametrize("room, target", [("engine", "ops"), ("engine", "data"), ("data", "engine"), ("data", "detectors"), ("evaluation", "data"), ("losses", "priors"), ("roi_heads", "dense_heads"),
                                          ("detectors", "data"), ("backbones", "necks"), ("ops", "layers"), ("foundations", "ops"), ("zoo", "explore")])
def test_forbidden_pairs(tmp_path, room, target):
    assert faults(arrows(package(tmp_path, **{f"{room}__a": f"from ..{target}.b import c\n"})))
