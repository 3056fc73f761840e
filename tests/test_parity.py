"""The networks compute what the reference computes (see parity.py, which runs any case from the command line)."""
import gzip, json
from pathlib import Path
import pytest
import parity

FOLDER = Path(__file__).parents[2]/"shared/parity"
CASES = ("fast_rcnn_r50_fpn", "faster_rcnn_ohem", "faster_rcnn_soft_nms", "libra_faster_rcnn_r50", "gn_mask_rcnn_r50", "gn_ws_mask_rcnn_r50", "gn_ws_faster_rcnn_x50_32x4d", "scratch_faster_rcnn_r50_gn", "scratch_mask_rcnn_r50_gn", "gcnet_mask_rcnn_r50_r16",
         "gcnet_mask_rcnn_r50_syncbn_r4", "empirical_attention_0010", "empirical_attention_1111", "empirical_attention_1111_dcn",
         "dcn_faster_rcnn_r50", "dcnv2_faster_rcnn_r50", "dcnv2_group4_faster_rcnn_r50", "dcn_dpool_faster_rcnn_r50", "dcnv2_mdpool_faster_rcnn_r50",
         "ghm_retinanet_r50_fpn", "ga_retinanet_r50_caffe", "ga_rpn_r50_caffe", "ga_faster_rcnn_r50_caffe", "libra_retinanet_r50",
         "ssd300_vgg16", "ssd512_vgg16", "fcos_r50_caffe_fpn_gn", "fcos_center_normbbox_giou", "fsaf_r50_fpn", "rpn_r50_fpn", "retinanet_r50_fpn", "retinanet_r18_fpn", "faster_rcnn_r50_fpn", "faster_rcnn_x101_32x4d_fpn", "faster_rcnn_r50_caffe_c4",
         "faster_rcnn_r50_caffe_dc5", "mask_rcnn_r50_fpn", "mask_rcnn_r50_caffe_fpn", "mask_rcnn_r50_caffe_c4",
         "faster_rcnn_iou", "faster_rcnn_giou", "faster_rcnn_bounded_iou",
         "cascade_rcnn_r50_fpn", "cascade_mask_rcnn_r50_fpn", "htc_without_semantic_r50", "htc_r50_fpn",
         "double_head_r50", "ms_rcnn_r50_caffe", "grid_rcnn_r50_gn",
         "hrnet_w18_faster_rcnn", "hrnet_w32_mask_rcnn", "hrnet_w18_fcos", "hrnet_w18_cascade_mask", "tridentnet_r50_caffe")
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="skipped: the reference's cases are not here")


def case(name): return json.loads(gzip.open(FOLDER/"cases"/f"{name}.json.gz").read())


@pytest.mark.parametrize("name", CASES)
def test_agrees(name):
    ok, text = parity.run(name, case(name), parity.load_inputs(FOLDER))
    assert ok is not False, text
    if ok is None: pytest.xfail(f"misses a limit of the published comparison: {text}")


def test_the_comparison_can_fail():
    "A loss off by a hundredth, a missing tensor, a shifted detection: each is noticed."
    inputs, c = parity.load_inputs(FOLDER), case("retinanet_r18_fpn")
    c["losses"]["loss_cls"] *= 1.01
    c["detections"][0]["boxes"] = [[x + 9 for x in b] for b in c["detections"][0]["boxes"]]
    ok, text = parity.run("changed", c, inputs)
    assert not ok and "losses DIFFER" in text and "detections DIFFER" in text and "features agree" in text
    del c["state"]["backbone.conv1.weight"]
    ok, text = parity.run("changed", c, inputs)
    assert not ok and "extra backbone.conv1.weight" in text
