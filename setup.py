"""`pip install -e .`: metadata from settings.ini, C++/CUDA operators from csrc/ (optional: without them the package runs on its readable references)."""
import configparser, hashlib, os, shutil, sys, sysconfig
from pathlib import Path
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
cfg.read(ROOT/"settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
EDITABLE = "editable_wheel" in sys.argv or "develop" in sys.argv   # a checkout has csrc/ already; a wheel carries it for the first-import build
FLAGS, GPU_FLAGS = ((ROOT/"csrc"/name).read_text().split() for name in ("flags.txt", "gpu_flags.txt"))


def sources_hash():
    "Of everything in csrc/, by name: it goes into the library, and the package does not load one built from other sources."
    h = hashlib.sha1()
    for p in sorted((ROOT/"csrc").iterdir(), key=lambda p: p.name):
        if p.suffix in (".cpp", ".cu", ".h", ".txt"): h.update(p.name.encode() + p.read_bytes())
    return h.hexdigest()[:16]


def cuda_home():
    "The folder of the CUDA compiler and its headers (as notebook_det/ops/library.py finds it), or None. torch takes the one above the first nvcc on the path, which may be a link."
    nvcc = shutil.which("nvcc")
    for d in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"):
        if d and (Path(d)/"bin/nvcc").exists() and (Path(d)/"include/cuda_runtime.h").exists(): return str(d)


def operators():
    "Keyword arguments that build `notebook_det/_C*.so`; empty without torch, without a compiler, or where NOTEBOOK_DET_OPS=0."
    if os.environ.get("NOTEBOOK_DET_OPS", "auto") == "0": return {}
    sys.path.append(sysconfig.get_path("purelib"))                # under build isolation: the torch of the target environment
    home = cuda_home()
    if home: os.environ["CUDA_HOME"] = home                       # read when cpp_extension is imported
    try: from torch.utils import cpp_extension as ext; import torch
    except ImportError: return later("torch is not importable while building")
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]): return later("there is no C++ compiler (c++, or what CXX names)")
    want = os.environ.get("NOTEBOOK_DET_CUDA", "auto")            # 1 | 0 | auto
    src = sorted(str(p.relative_to(ROOT)) for p in (ROOT/"csrc").glob("*.cpp"))
    cu = sorted(str(p.relative_to(ROOT)) for p in (ROOT/"csrc").glob("*.cu"))
    if want == "1" and not home: sys.exit("NOTEBOOK_DET_CUDA=1, but there is no CUDA compiler: set CUDA_HOME to the folder with bin/nvcc and include/cuda_runtime.h")
    cuda = want == "1" or (want == "auto" and torch.cuda.is_available() and home is not None)
    if cuda and not torch.cuda.is_available(): os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")   # else those of this machine
    made = [f"-DNDET_SOURCES={sources_hash()}"]                   # as notebook_det/ops/library.py reckons it
    flags = {"cxx": FLAGS + ["-g0"] + made}

    def extension(cuda):
        kind = ext.CUDAExtension if cuda else ext.CppExtension
        return kind("notebook_det._C", src + (cu if cuda else []), extra_compile_args={**flags, "nvcc": GPU_FLAGS + made} if cuda else flags, py_limited_api=True, optional=True)

    class Build(ext.BuildExtension):
        def build_extensions(self):
            try: super().build_extensions()
            except Exception as e:                                # a compiler that fails must not cost the whole package
                if os.environ.get("NOTEBOOK_DET_OPS") == "1": raise
                if not any(f.endswith(".cu") for x in self.extensions for f in x.sources): return later(f"compiling failed ({e})")
                if want == "1": raise
                later(f"compiling for the GPU failed ({e}); trying without")
                self.extensions = [extension(False)]
                self.build_extensions()

    return dict(ext_modules=[extension(cuda)], cmdclass={"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)})


def later(why):
    print(f"notebook_det: {why}; operators are left to the first import", file=sys.stderr)
    return {}


setup(
    name=s["lib_name"], version=s["version"], description=s["description"], author=s["author"], license="Apache-2.0",
    long_description=(ROOT/"README.md").read_text(encoding="utf-8") if (ROOT/"README.md").exists() else "",
    long_description_content_type="text/markdown", python_requires=">=" + s["min_python"],
    packages=find_packages(include=["notebook_det", "notebook_det.*"]) + ([] if EDITABLE else ["notebook_det._csrc"]),
    package_dir={} if EDITABLE else {"notebook_det._csrc": "csrc"}, package_data={"": ["*.cpp", "*.cu", "*.h", "*.csv", "*.json"], "notebook_det._csrc": ["*.txt"]},
    install_requires=s.get("requirements", "").split(),
    extras_require={k: s.get(f"{k}_requirements", "").split() for k in ("dev", "fast")},
    entry_points={"nbdev": [f"{s['lib_name']}={s['lib_path']}._modidx:d"], "console_scripts": s.get("console_scripts", "").split()},
    zip_safe=False, **operators())
