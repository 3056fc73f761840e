"Every recipe of the zoo builds with exactly the names and shapes of the published weights."
import gzip, json
from pathlib import Path
import pytest, torch
from notebook_det import build, zoo
from notebook_det.zoo import recipes
from notebook_det.foundations.recipes import diff, from_json, to_json

SHAPES = Path(__file__).parents[2]/"shared/reference/state_dicts.json.gz"
FAMILIES = ("gn", "gn+ws", "scratch", "gcnet", "empirical_attention", "dcn", "dcnv2", "rpn", "retinanet", "faster_rcnn", "mask_rcnn", "fcos", "fsaf", "ssd", "ghm", "guided_anchoring", "libra_rcnn", "double_heads", "ms_rcnn", "grid_rcnn", "cascade_rcnn", "htc", "hrnet", "tridentnet")
BUILT = {}   # a model's recipe as JSON → its names and shapes: recipes that differ in data or schedule only are built once


def shapes(model):
    key = to_json(model)
    if key not in BUILT:
        with torch.device("meta"): BUILT[key] = {k: list(v.shape) for k, v in build(model).state_dict().items()}
    return BUILT[key]


@pytest.mark.skipif(not SHAPES.exists(), reason="skipped: the reference shapes are not here")
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_as_published(family, capsys):
    want, rows = json.loads(gzip.open(SHAPES).read()), [r for r in zoo.table() if r["family"] == family]
    for r in rows: assert shapes(zoo.recipe(r["name"]).model) == want[r["name"]], r["name"]
    with capsys.disabled(): print(f"\n{family}: {len(rows)} of {len(rows)} published recipes have the published names and shapes", end=" ")


def test_a_published_row_is_found_by_each_of_its_names():
    for r in zoo.table(): assert recipes.find_row(Path(r["config"]).stem)["name"] == recipes.find_row(r["name"])["name"] == r["name"]
    a, b = zoo.recipe("faster-rcnn_r50_fpn_fp16_1x_coco"), zoo.recipe("faster-rcnn_r50_fpn_amp-1x_coco")
    assert diff(a, b) == [] and a.schedule.amp
    for r in zoo.table():
        if recipes.known(r): assert recipes.recipe(r["name"]).schedule.epochs == int(r["epochs"]) + (r["family"] == "grid_rcnn"), r["name"]   # Grid R-CNN's "2x" trained 25


def test_every_published_row_has_one_recipe(capsys):
    rows = zoo.table()
    assert {r["family"] for r in rows} == set(FAMILIES)
    several = {r["name"]: n for r in rows if (n := sum(m.NAME.fullmatch(recipes.stem(r)) is not None for m in recipes.MODULES)) != 1}
    assert not several and len(rows) == 243, several
    with capsys.disabled(): print(f"\n{len(rows)} of 243 published names build", end=" ")


@pytest.mark.parametrize("name", ["faster_rcnn_mobilenet", "mask_rcnn_mobilenet", "retinanet_mobilenet", "ssdlite_mobilenet", "ssd300_coco", "m2det_vgg16_320", "rpn_r50_fpn_1x_coco", "faster-rcnn_r50-caffe-c4_1x_coco", "htc_r50_fpn_1x_coco"])
def test_a_whole_experiment_survives_json(name):
    e = zoo.recipe(name, ["a", "b"])
    back = from_json(to_json(e))
    assert diff(e, back) == []
    with torch.device("meta"): assert build(back.model).num_classes == (None if name.startswith("rpn") else 2)


@pytest.mark.parametrize("name", ["faster_rcnn_mobilenet", "mask_rcnn_mobilenet", "retinanet_mobilenet", "ssdlite_mobilenet", "htc_without_semantic_mobilenet"])
def test_small_recipes_train_every_layer_that_is_used(name):
    torch.manual_seed(0)
    e = zoo.recipe(name, 2)
    model = build(e.model)
    assert all(p.requires_grad for p in model.parameters())
    image = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    target = dict(boxes=torch.tensor([[10., 10., 60., 70.]]), labels=torch.tensor([1]), masks=torch.ones(1, 96, 128, dtype=torch.bool))
    sum(model([image], [target]).values()).backward()
    idle = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is None}
    assert idle <= {"conv2"}, idle       # MobileNetV2's last convolution has a published name, but no level of the pyramid reads it


def test_the_front_door_is_light_and_complete():
    import subprocess, sys
    import notebook_det
    code = "import sys, notebook_det; assert 'torch' not in sys.modules and 'fiddle' not in sys.modules; print(notebook_det.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == notebook_det.__version__
    for package in (notebook_det, zoo):
        for name in package.__all__: assert getattr(package, name) is not None, name
        with pytest.raises(AttributeError, match="no attribute 'nothing'"): package.nothing
