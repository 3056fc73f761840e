"A recipe file can name classes and functions; none outside the allow-list is imported, whatever the file's shape."
import json, subprocess, sys
from pathlib import Path
import pytest
from torch import nn
from notebook_det.foundations.recipes import Config, Partial, build, diff, from_json, load, override, save, select, to_json

EVIL = "boom"   # a module on the path whose import leaves a mark


@pytest.fixture
def evil(tmp_path, monkeypatch):
    mark = tmp_path/"imported"
    (tmp_path/f"{EVIL}.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef go(*a, **k): open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop(EVIL, None)


def everywhere(tree, path=()): # the path of every dict in a JSON tree
    if isinstance(tree, dict): yield path
    for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else (): yield from everywhere(v, (*path, k))


def test_a_strange_name_anywhere_is_refused_without_an_import(evil):
    "Put the reference at every place of a real recipe in turn: as a callable, a value, a type, metadata."
    text = to_json(Config(nn.TransformerEncoder, Config(nn.TransformerEncoderLayer, 8, 2), 2, norm=Partial(nn.LayerNorm, 8)))
    places = list(everywhere(json.loads(text)))
    assert len(places) > 30
    for path in places:
        tree = json.loads(text); node = tree
        for k in path[:-1]: node = node[k]
        ref = {"type": "pyref", "module": EVIL, "name": "go"}
        if path: node[path[-1]] = ref
        else: tree = {**tree, "root": ref}
        with pytest.raises(ValueError, match=rf"my\.json refers to {EVIL}\.go, which is not among what a recipe may call"):
            from_json(json.dumps(tree), name="my.json")
    assert not evil.exists() and EVIL not in sys.modules


@pytest.mark.parametrize("module, name", [("os", "system"), ("subprocess", "Popen"), ("builtins", "exec"), ("builtins", "__import__"), ("torch", "load"), ("torch.hub", "load"),
                                          ("torch.utils.cpp_extension", "load_inline"), ("torch.nn.modules.module", "warnings.sys.exit"), ("notebook_det.foundations.recipes", "os.remove"),
                                          ("notebook_det.foundations.recipes", "fdl.build"), ("notebook_det..os", "system"), ("", "eval"), (None, None), (3, "x"), ("torch.nn", ""), ("torch.nn", "Module.__init__.__globals__")])
def test_names_that_only_look_harmless(module, name):
    tree = json.loads(to_json(Config(nn.ReLU)))
    for o in tree["objects"].values():
        for ref in [o.get("type"), o.get("metadata"), *[v for _, v in o.get("items", [])]]:
            if isinstance(ref, dict) and ref.get("name") == "ReLU": ref.update(module=module, name=name)
    text = json.dumps(tree).replace('"module": "torch.nn.modules.activation", "name": "ReLU"', f'"module": {json.dumps(module)}, "name": {json.dumps(name)}')
    with pytest.raises(ValueError, match="^this recipe (refers to|names|is not a recipe)"): from_json(text)


def test_my_own_package_when_i_say_so(evil):
    import importlib
    boom = importlib.import_module(EVIL)
    text = to_json(Config(boom.go, 1))
    with pytest.raises(ValueError, match="refers to boom.go"): from_json(text)
    assert from_json(text, allow=(EVIL,)) == Config(boom.go, 1)


def test_saving_never_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path/"r.json"; save(Config(nn.ReLU), path)
    before = path.read_bytes()
    def full(self, *a, **k): self.write_bytes(b"{"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError): save(Config(nn.GELU), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_missing_and_broken_files_name_themselves(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"): load(tmp_path/"none.json")
    (tmp_path/"x.json").write_bytes(b"\x80\x04\x95\xff")
    with pytest.raises(ValueError, match="x.json is not a recipe"): load(tmp_path/"x.json")


def test_override_round_trip_through_a_file(tmp_path):
    a = Config(nn.TransformerEncoder, Config(nn.TransformerEncoderLayer, 8, 2), 2)
    b = from_json(to_json(a))
    override(b, "encoder_layer.dropout=0.5"); select(b, nn.TransformerEncoderLayer).set(bias=False)
    save(b, tmp_path/"b.json")
    assert list(diff(a, load(tmp_path/"b.json"))) == ["encoder_layer.dropout: 0.1 → 0.5", "encoder_layer.bias: True → False"]
    assert build(load(tmp_path/"b.json")).layers[0].dropout.p == 0.5


def test_recipes_are_light():
    "Importing recipes must not import matplotlib or the rest of the package: command lines start with it."
    code = "import sys; import notebook_det.foundations.recipes; print(sorted(m for m in sys.modules if m.startswith(('matplotlib', 'IPython', 'torchvision'))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout.strip() == "[]"
