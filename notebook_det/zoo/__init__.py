"Recipes, published weights, and detectors ready to use: `from notebook_det import zoo; zoo.recipe(…)`."
from importlib import import_module

_HOME = {"recipes": "recipe names table laptop resnet mobilenet_v2 fpn rpn_head rpn retinanet faster_rcnn mask_rcnn faster_rcnn_c4 faster_rcnn_dc5 "
                    "torchvision_pixels caffe_pixels d2_pixels tf_pixels set_classes from_scratch train_transform test_transform "
                    "Data Schedule Experiment NotYet",
         "anchor_free": "fcos fsaf improved",
         "retina_variants": "ghm_retinanet libra_retinanet libra_faster_rcnn ga_retinanet ga_rpn ga_faster_rcnn",
         "ssd": "ssd300 ssd512 ssdlite scratchdet m2det",
         "cascade": "cascade_rcnn cascade_mask_rcnn htc htc_without_semantic",
         "roi_variants": "double_head_rcnn ms_rcnn grid_rcnn",
         "two_stage_more": "fast_rcnn ga_fast_rcnn with_ohem with_soft_nms rfcn",
         "trident": "tridentnet scale_aware",
         "hrnet": "with_hrfpn", "dcn": "with_dcn with_deform_pool", "norms": "with_norm with_root_stem", "attention": "with_context with_attention",
         "download": "weights_of",
         "checkpoints": "load_checkpoint load_imagenet torchvision_conventions Report",
         "predict": "load predict_folder"}
_NAMES = {name: module for module, names in _HOME.items() for name in names.split()}
__all__ = list(_NAMES)


def __getattr__(name):
    "Import a room when something in it is asked for."
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__(): return sorted({*globals(), *_NAMES})
