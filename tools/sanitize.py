"""The C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer: python tools/sanitize.py [pytest arguments]

Builds csrc/ with both in a folder of its own (some minutes), and runs the operators' tests there, without those that compile or
export. The first error ends a test process with a report; exit status 0 means that there was none."""
import os, shutil, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
TESTS = ["tests/test_ops.py", "tests/test_ops_roi.py", "tests/test_ops_more.py", "tests/test_emulated.py"]
# What needs a process of its own (it would not be sanitized), compiles in torch, or measures memory
LEAVE = "not world and not compiler and not torchs_checks and not compile and not opcheck and not memory and not stale and not again and not notebook"


def build(folder, cxx):
    "The library of the copy in `folder`, with the hash that the package expects."
    sys.path.insert(0, str(folder))
    os.environ["NOTEBOOK_DET_OPS"] = "0"
    from notebook_det.ops.library import sources_hash
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths
    flags = (folder/"csrc/flags.txt").read_text().split() + [f"-DNDET_SOURCES={sources_hash(folder/'csrc')}", "-std=c++20", "-fPIC", *SANITIZE]
    flags += [f for p in include_paths() for f in ("-isystem", p)]
    def one(src):
        obj = src.with_suffix(".o")
        subprocess.run([cxx, *flags, "-c", str(src), "-o", str(obj)], check=True)
        return str(obj)
    with ThreadPoolExecutor(os.cpu_count()) as pool: objects = list(pool.map(one, sorted((folder/"csrc").glob("*.cpp"))))
    libs = [f for p in library_paths() for f in ("-L" + p,)] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([cxx, "-shared", *SANITIZE, *objects, *libs, "-o", str(folder/"notebook_det/_C.abi3.so")], check=True)


def main():
    cxx = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name in ("notebook_det", "csrc", "tests"): shutil.copytree(ROOT/name, folder/name, ignore=shutil.ignore_patterns("*.so", "*.o", "__pycache__"))
        shutil.copy(ROOT/"conftest.py", folder); shutil.copy(ROOT/"pytest.ini", folder); shutil.copy(ROOT/"setup.py", folder); shutil.copy(ROOT/"settings.ini", folder)
        build(folder, cxx)
        runtime = [subprocess.run([cxx, f"-print-file-name={lib}"], capture_output=True, text=True, check=True).stdout.strip() for lib in ("libasan.so", "libubsan.so")]
        env = os.environ | dict(LD_PRELOAD=":".join(runtime), ASAN_OPTIONS="detect_leaks=0:abort_on_error=1", UBSAN_OPTIONS="print_stacktrace=1", OMP_NUM_THREADS="1", PYTHONPATH=str(folder),
                                 NDET_EMULATED_FLAGS=" ".join(SANITIZE))                  # the kernels for GPUs, as tests/test_emulated.py compiles them for a CPU
        env.pop("NOTEBOOK_DET_OPS")
        check = "from notebook_det.ops.library import LOADED; import sys; sys.exit(LOADED if 'reference' in LOADED else 0)"
        if subprocess.run([sys.executable, "-c", check], cwd=folder, env=env).returncode: return 1
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", LEAVE, *(sys.argv[1:] or TESTS)], cwd=folder, env=env).returncode


if __name__ == "__main__": sys.exit(main())
