"Weights of torchvision's detectors compute the same here; files with code in them are refused, whatever the code is."
import io, os, pickle, struct, zipfile
import pytest, torch
from torchvision.models import detection
from notebook_det import build, load_checkpoint, zoo
from notebook_det.engine.checkpoint import CheckpointError
from notebook_det.zoo import checkpoints


def temper(model):
    "Random weights with scores worth comparing: well apart, not saturated."
    torch.manual_seed(1)
    for k, v in model.state_dict().items():
        if k.startswith("backbone.fpn") and v.ndim == 4: v.mul_(.1)
        if k.endswith("cls_score.weight"): v.normal_(std=.6)
        if k.endswith("rpn.head.cls_logits.weight"): v.normal_(std=.3)
        if k.endswith("classification_head.cls_logits.weight"): v.normal_(std=1.)
        if k.endswith("classification_head.cls_logits.bias"): v.fill_(-2.).view(9, -1)[:, 0] = -30.
    return model.eval()


CASES = {"fasterrcnn_resnet50_fpn": zoo.faster_rcnn, "maskrcnn_resnet50_fpn": zoo.mask_rcnn, "retinanet_resnet50_fpn": zoo.retinanet}

@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_torchvisions_detectors_compute_the_same(name, tmp_path):
    "All of ResNet-50: features, and every detection with its class and score."
    theirs = temper(getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91, min_size=256, max_size=320))
    torch.save(theirs.state_dict(), tmp_path/"tv.pth")
    recipe = checkpoints.torchvision_conventions(CASES[name](zoo.resnet(50), 90))          # 90: COCO's unused numbers kept
    if "retina" in name: recipe.bbox_head.rule.max_detections = 300
    ours = build(recipe).eval()
    assert load_checkpoint(ours, tmp_path/"tv.pth", strict=True).complete
    photo = torch.rand(3, 256, 320)
    a, b = theirs([photo])[0], ours([photo])[0]
    for f, g in zip(theirs.backbone(theirs.transform([photo])[0].tensors).values(), ours.features(ours.normalize([photo]).tensor)):
        assert (f - g).abs().max() < 1e-4 * f.std()
    assert len(b) == len(a["boxes"]) >= 50
    near = ((a["boxes"][:, None] - b.boxes).abs().amax(2) < .01) & (a["labels"][:, None] == b.labels + 1) & ((a["scores"][:, None] - b.scores).abs() < 1e-4)
    assert near.any(1).float().mean() > .98
    if "mask" in name:   # the 28 × 28 probabilities; pasting them into the picture is done differently
        features, boxes = theirs.backbone(theirs.transform([photo])[0].tensors), [b.boxes]
        raw = theirs.roi_heads.mask_predictor(theirs.roi_heads.mask_head(theirs.roi_heads.mask_roi_pool(features, boxes, [(256, 320)])))
        want = raw[torch.arange(len(b)), b.labels + 1].sigmoid()
        torch.testing.assert_close(ours.roi_head.mask_probabilities(ours.features(ours.normalize([photo]).tensor), [b])[0], want, atol=1e-4, rtol=1e-3)


def test_coco_files_of_torchvision_lose_the_numbers_that_coco_does_not_use(tmp_path):
    theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    torch.save(theirs, tmp_path/"tv.pth")
    with torch.device("meta"): ours = build(zoo.faster_rcnn(zoo.resnet(50)))
    state, _ = checkpoints.convert(theirs, ours)
    assert all(ours.state_dict()[k].shape == v.shape for k, v in state.items())
    cls, reg = state["roi_head.bbox_head.fc_cls.weight"], state["roi_head.bbox_head.fc_reg.weight"].view(80, 4, -1)
    assert torch.equal(cls[-1], theirs["roi_heads.box_predictor.cls_score.weight"][0])                   # background
    for ours_, coco in ((0, 1), (11, 13), (79, 90)):                                                     # person, parking meter's neighbour, toothbrush
        assert torch.equal(cls[ours_], theirs["roi_heads.box_predictor.cls_score.weight"][coco])
        assert torch.equal(reg[ours_], theirs["roi_heads.box_predictor.bbox_pred.weight"].view(91, 4, -1)[coco])


def test_second_versions_of_torchvision_are_refused(tmp_path):
    torch.save(detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict(), tmp_path/"v2.pth")
    with pytest.raises(CheckpointError, match=r"v2\.pth: torchvision's detectors of the second version"):
        load_checkpoint(build(zoo.faster_rcnn(zoo.resnet(18), 3, out_channels=32)), tmp_path/"v2.pth")


# ---- files with code in them

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

EVIL = [Call(os.system, "touch {mark}"), Call(eval, "open('{mark}', 'w')"), Call(exec, "open('{mark}', 'w')"), Call(open, "{mark}", "w"), Call(getattr, "text", "upper"),
        Call(__import__, "os"), Call(pickle.loads, b"")]

@pytest.mark.parametrize("k", range(len(EVIL)))
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_never_runs(k, zipped, tmp_path):
    mark = tmp_path/"mark"
    bomb = EVIL[k]; bomb = Call(bomb.f, *(a.format(mark=mark) if isinstance(a, str) else a for a in bomb.args))
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": bomb}, tmp_path/"evil.pth", _use_new_zipfile_serialization=zipped)
    try: data = checkpoints.read_file(tmp_path/"evil.pth")
    except CheckpointError as e: assert "evil.pth" in str(e) and len(str(e).splitlines()) == 1
    else: assert bomb.f is getattr and data["meta"] == {}      # a stand-in: neither found nor called
    assert not mark.exists()


def handmade(path, program):
    "A checkpoint file around a hand-written pickle program."
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"\x80\x02" + program); z.writestr("archive/version", "3\n"); z.writestr("archive/byteorder", "little")


def text(s): return b"X" + struct.pack("<I", len(s)) + s.encode()

@pytest.mark.parametrize("name", ["mmengine.runner.Runner", "mmcv.runner.anything", "mmdet.x.y"])
def test_left_over_classes_become_empty_dicts_even_if_their_package_exists(name, tmp_path, monkeypatch):
    package = name.partition(".")[0]
    (tmp_path/f"{package}.py").write_text(f"open({str(tmp_path/'imported')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    module, _, cls = name.rpartition(".")
    program = b"}" + text("x") + f"c{module}\n{cls}\n".encode() + b")\x81}" + text("inside") + b"K\x01sb" + b"s."
    handmade(tmp_path/"odd.pth", program)
    assert checkpoints.read_file(tmp_path/"odd.pth") == {"x": {}}
    assert not (tmp_path/"imported").exists()


def test_a_name_that_only_looks_left_over_is_refused(tmp_path):
    handmade(tmp_path/"odd.pth", b"}" + text("x") + b"cmmcv_evil\nrun\n)Rs.")
    with pytest.raises(CheckpointError, match=r"odd\.pth was not read: it holds mmcv_evil\.run"): checkpoints.read_file(tmp_path/"odd.pth")


def test_a_truncated_download_never_loads_half(tmp_path):
    model = build(zoo.retinanet(zoo.resnet(18), 3, out_channels=32))
    file = io.BytesIO(); torch.save(model.state_dict(), file)
    whole, before = file.getvalue(), {k: v.clone() for k, v in model.state_dict().items()}
    for share in (0, .001, .3, .9, .9999):
        (tmp_path/"cut.pth").write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(CheckpointError, match=r"cut\.pth"): load_checkpoint(model, tmp_path/"cut.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- ImageNet weights that torchvision fetches

def test_weights_are_fetched_by_name(monkeypatch):
    import torchvision
    from torchvision.models import _api
    asked = []
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda url, *a, **kw: (asked.append(url), torchvision.models.resnet50(weights=None).state_dict())[1])
    for name, file in (("torchvision:resnet50", "resnet50-0676ba61.pth"), (zoo.recipe("faster-rcnn_r50_fpn_tnr-pretrain_1x_coco").pretrained, "resnet50-11ad3fa6.pth")):
        assert not zoo.load_imagenet(build(zoo.resnet(50)), name).missing
        assert asked[-1].endswith(file)
    def down(*a, **kw): raise OSError("no route to host")
    monkeypatch.setattr(_api, "load_state_dict_from_url", down)
    with pytest.raises(CheckpointError, match=r"'torchvision:resnet50' could not be fetched \(no route to host\); give a file"): zoo.load_imagenet(build(zoo.resnet(50)), "torchvision:resnet50")
