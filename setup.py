"""`pip install -e .`: metadata from settings.ini, C++/CUDA operators from csrc/ (optional: without them the package runs on its readable references)."""
import configparser, os, sys, sysconfig
from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
cfg.read(ROOT/"settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
EDITABLE = "editable_wheel" in sys.argv or "develop" in sys.argv   # a checkout has csrc/ already; a wheel carries it for the first-import build
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"                  # LibTorch stable ABI of torch 2.11: one library for every later torch


def operators():
    "Keyword arguments that build `notebook_det/_C*.so`; empty where torch is not importable or NOTEBOOK_DET_OPS=0."
    if os.environ.get("NOTEBOOK_DET_OPS", "auto") == "0": return {}
    sys.path.append(sysconfig.get_path("purelib"))                # under build isolation: the torch of the target environment
    try: from torch.utils import cpp_extension as ext; import torch
    except ImportError:
        print("notebook_det: torch is not importable while building; operators are left to the first import", file=sys.stderr)
        return {}
    want = os.environ.get("NOTEBOOK_DET_CUDA", "auto")            # 1 | 0 | auto
    cuda = want == "1" or (want == "auto" and torch.cuda.is_available() and ext.CUDA_HOME is not None)
    src = sorted(str(p.relative_to(ROOT)) for p in (ROOT/"csrc").rglob("*.cpp"))
    if cuda: src += sorted(str(p.relative_to(ROOT)) for p in (ROOT/"csrc").rglob("*.cu"))
    if not src: return {}
    flags = {"cxx": ["-O3", "-g0", ABI], **({"nvcc": ["-O3", ABI, "-DUSE_CUDA"]} if cuda else {})}
    kind = ext.CUDAExtension if cuda else ext.CppExtension
    return dict(ext_modules=[kind("notebook_det._C", src, extra_compile_args=flags, py_limited_api=True)],
                cmdclass={"build_ext": ext.BuildExtension.with_options(use_ninja=True)})


setup(
    name=s["lib_name"], version=s["version"], description=s["description"], author=s["author"], license="Apache-2.0",
    long_description=(ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else "",
    long_description_content_type="text/markdown", python_requires=">=" + s["min_python"],
    packages=find_packages(include=["notebook_det", "notebook_det.*"]) + ([] if EDITABLE else ["notebook_det._csrc"]),
    package_dir={} if EDITABLE else {"notebook_det._csrc": "csrc"}, package_data={"": ["*.cpp", "*.cu", "*.h", "*.csv", "*.json"]},
    install_requires=s.get("requirements", "").split(),
    extras_require={"dev": s.get("dev_requirements", "").split()},
    entry_points={"nbdev": [f"{s['lib_name']}={s['lib_path']}._modidx:d"], "console_scripts": s.get("console_scripts", "").split()},
    zip_safe=False, **operators())
