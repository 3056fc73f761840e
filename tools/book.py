"""Notebooks in and out, with what JupyterLab already installs (nbformat, nbclient, nbconvert).

    python tools/book.py text NB [FILE]           notebook -> percent script (to FILE or the terminal), outputs left behind
    python tools/book.py write FILE NB            percent script -> notebook; cells that did not change keep their outputs
    python tools/book.py run [NB ...]             execute in place, keep still outputs only, clean
    python tools/book.py export                   notebooks -> the package
    python tools/book.py clean                    what `nbdev_clean` does, for the whole book
    python tools/book.py readme                   nbs/index.ipynb -> README.md
    python tools/book.py site                     nbs/**/*.ipynb -> _docs/**/*.html
    python tools/book.py quickstart [NB [FOLDER]] run a notebook's cells in the terminal; pictures go to FOLDER (runs/quickstart)

`quickstart` needs nothing but what the package needs.
"""
import ast, hashlib, html, json, linecache, os, re, shutil, sys, time, traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]; NBS = ROOT/"nbs"; OUT = ROOT/"_docs"
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebooks():
    "Every notebook of the book, in reading order."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(o.startswith(("_", ".")) for o in p.relative_to(NBS).parts))


def _flags():
    from nbdev.config import get_config
    flags = "|".join(get_config(path=ROOT).tst_flags.split())
    return re.compile(rf"^#\|\s*({flags})\s*$|^#\|\s*eval:\s*false", re.M)


def text(nb, out=None):
    "Notebook to percent script: `# %%` before a code cell, `# %% [markdown]` before a text cell whose lines are bare."
    import nbformat
    cells = nbformat.read(nb, as_version=4).cells
    body = "\n\n".join(("# %% [markdown]\n" if c.cell_type == "markdown" else "# %%\n") + c.source for c in cells) + "\n"
    Path(out).write_text(body, encoding="utf-8") if out else print(body, end="")


def _ids(cells):
    "Ids that do not change when a cell moves: the first symbol that an exported cell defines, else a hash of its text."
    seen = {}
    for c in cells:
        name = re.search(r"^(?:class|def)\s+(\w+)", c.source, re.M) if re.search(r"^#\|\s*export", c.source, re.M) else None
        base = name.group(1).lower()[:40].replace("_", "-").strip("-") if name else hashlib.sha1(c.source.encode()).hexdigest()[:8]
        n = seen[base] = seen.get(base, 0) + 1
        c["id"] = base if n == 1 else f"{base}-{n}"


def write(src, nb):
    "Percent script to notebook. Text cells are written bare (no leading `# `)."
    import nbformat
    parts = re.split(r"^# %%(.*)\n", Path(src).read_text(encoding="utf-8"), flags=re.M)[1:]
    cells = [(nbformat.v4.new_markdown_cell if "[markdown]" in kind else nbformat.v4.new_code_cell)(body.strip("\n"))
             for kind, body in zip(parts[::2], parts[1::2]) if body.strip()]
    _ids(cells)
    nb = Path(nb)
    old = {c.source: c for c in nbformat.read(nb, as_version=4).cells if c.cell_type == "code"} if nb.exists() else {}
    for c in cells:
        if c.cell_type == "code" and c.source in old: c.outputs = old[c.source].outputs
    nb.parent.mkdir(parents=True, exist_ok=True)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    _save(nbformat.v4.new_notebook(cells=cells, metadata=meta), nb)


def _save(book, path):
    "nbdev_clean's own byte form, so that cleaning afterwards changes nothing; an unchanged file is not touched."
    import nbformat
    from nbdev.clean import clean_nb
    from execnb.nbio import nb2str, dict2nb
    book = dict2nb(json.loads(nbformat.writes(book, split_lines=True)))
    clean_nb(book, clear_all=False, allowed_metadata_keys=[], allowed_cell_metadata_keys=["tags"])
    new = nb2str(book)
    if not path.exists() or path.read_text(encoding="utf-8") != new: path.write_text(new, encoding="utf-8")


def run(path):
    "Execute a notebook in place; cells flagged slow, gpu or `eval: false` keep the outputs that they have."
    import nbformat
    from nbclient import NotebookClient
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])   # for the kernel; also where the package is not installed
    flag = _flags()
    nb = nbformat.read(path, as_version=4)
    keep = {i: c for i, c in enumerate(nb.cells) if c.cell_type == "code" and flag.search(c.source)}
    todo = nbformat.from_dict({**nb, "cells": [nbformat.v4.new_raw_cell(c.source, id=c.id) if i in keep else c for i, c in enumerate(nb.cells)]})
    NotebookClient(todo, timeout=1200, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for i, c in enumerate(todo.cells):
        if i in keep: todo.cells[i] = keep[i]
        elif c.cell_type == "code": c.outputs = _still(c.outputs)
    todo.metadata.pop("widgets", None); todo.metadata.pop("language_info", None)
    _save(todo, path)
    for fault in faults(path): print(" ", fault, flush=True)


def faults(path):
    "What a committed notebook must not have: heavy outputs, errors, widget state, paths of the machine that ran it."
    nb, out = json.loads(path.read_text(encoding="utf-8")), []
    if path.stat().st_size > 600_000: out.append(f"{path.stat().st_size // 1000} kB: a notebook may have 600")
    if "widgets" in nb["metadata"]: out.append("widget state")
    for i, c in enumerate(nb["cells"]):
        for o in c.get("outputs", []):
            body = json.dumps(o)
            if o["output_type"] == "error" or o.get("name") == "stderr": out.append(f"cell {i}: an error or stderr output")
            if len(body) > 140_000: out.append(f"cell {i}: an output of {len(body) // 1000} kB; a picture may have 100 (draw.still makes a JPEG)")
            if re.search(r"(?<![\w.])/(?:work|root|home|Users)/\w", body): out.append(f"cell {i}: a path of this machine in the output")
    return out


def export():
    "Every notebook's exported cells to the package."
    os.chdir(ROOT)
    from nbdev.doclinks import nbdev_export
    nbdev_export.__wrapped__()


def clean():
    "Every notebook in nbdev's clean form."
    import nbformat
    for p in notebooks(): _save(nbformat.read(p, as_version=4), p)


def _still(outputs):
    "Outputs without widgets; progress output on stderr is dropped, pieces of one stream are joined."
    out = []
    for o in outputs:
        if WIDGET in o.get("data", {}) or o.get("name") == "stderr": continue
        if out and o.output_type == "stream" and out[-1].output_type == "stream": out[-1].text += o.text
        else: out.append(o)
    return out


def _hidden(nb):
    "Drop `#| hide` cells, the source of `#| echo: false` cells, and nbdev's directive lines."
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(hide|default_exp)", c.source, re.M)]
    for c in nb.cells:
        if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.metadata["transient"] = {"remove_source": True}     # only what it shows
        c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    return nb


def readme_text():
    "README.md made from nbs/index.ipynb, and the pictures it shows (name → bytes)."
    import nbformat
    from nbconvert import MarkdownExporter
    body, res = MarkdownExporter().from_notebook_node(_hidden(nbformat.read(NBS/"index.ipynb", as_version=4)))
    pictures = res.get("outputs") or {}
    for name in pictures: body = body.replace(f"({name})", f"(nbs/images/{name})")
    body = re.sub(r"\]\((?![a-z]+:|#|nbs/images/)([^)\s]+)", lambda m: f"]({os.path.normpath('nbs/' + m[1])}", body)    # links as seen from the root
    head = "<!-- Made from nbs/index.ipynb by `make readme`: do not edit -->\n\n"
    return head + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", pictures


def readme():
    "nbs/index.ipynb to README.md; pictures go into nbs/images/."
    text, pictures = readme_text()
    (ROOT/"README.md").write_text(text, encoding="utf-8")
    for old in (NBS/"images").glob("output_*"): old.unlink()
    for name, data in pictures.items():
        (NBS/"images").mkdir(exist_ok=True); (NBS/"images"/name).write_bytes(data)


def _title(nb, p): return next((l[2:] for c in nb.cells if c.cell_type == "markdown" for l in c.source.splitlines() if l.startswith("# ")), p.stem)


def _nav(pages, here):
    "The list of all pages as links, grouped by chapter."
    out, chapter = [], None
    for p, nb in pages:
        d = p.parent.relative_to(NBS).as_posix()
        if d != chapter and d != ".": out.append(f"<h3>{html.escape(d.replace('_', ' '))}</h3>")
        chapter, target = d, (OUT/p.relative_to(NBS)).with_suffix(".html")
        mark = " aria-current=page" if p == here else ""
        out.append(f'<a href="{os.path.relpath(target, (OUT/here.relative_to(NBS)).parent)}"{mark}>{html.escape(_title(nb, p))}</a>')
    return "\n".join(out)


def mathml(body):
    "Formulas between dollars as MathML, which browsers draw themselves; code is left alone."
    from latex2mathml.converter import convert
    def formula(m):
        tex, kind = m[1] or m[2], "block" if m[1] else "inline"
        try: return convert(html.unescape(re.sub(r"</?em>", "_", tex)), display=kind)
        except Exception: return m[0]
    parts = re.split(r"(<pre.*?</pre>|<code.*?</code>|<svg.*?</svg>)", body, flags=re.S)
    return "".join(p if i % 2 else re.sub(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", formula, p, flags=re.S) for i, p in enumerate(parts))


def site():
    "Every notebook as a static page; nothing is fetched from elsewhere."
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    shutil.rmtree(OUT, ignore_errors=True)
    pages = [(p, _hidden(nbformat.read(p, as_version=4))) for p in notebooks()]
    pages.sort(key=lambda o: (o[0].name != "index.ipynb", o[0].as_posix()))
    export = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    css = HtmlFormatter(style="default").get_style_defs(".highlight") + CSS
    for p, nb in pages:
        body, _ = export.from_notebook_node(nb)
        body = mathml(body)
        body = re.sub(r'href="([^":]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
        dst = (OUT/p.relative_to(NBS)).with_suffix(".html"); dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_text(PAGE.format(title=html.escape(_title(nb, p)), css=css, nav=_nav(pages, p), body=body), encoding="utf-8")
    print(f"{len(pages)} pages in {OUT}")


class Terminal:
    "A notebook's display for people without one: texts are printed, pictures become numbered files."
    def __init__(self, folder): self.folder, self.n = folder, 0
    def file(self, kind, data):
        self.n += 1
        path = self.folder/f"{self.n:02d}.{kind}"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        print(f"[picture] {os.path.relpath(path, ROOT)}")

    def figures(self):
        import matplotlib.pyplot as plt
        for k in plt.get_fignums(): self.figure(plt.figure(k))

    def figure(self, fig):
        import io, matplotlib.pyplot as plt
        file = io.BytesIO(); fig.savefig(file, dpi=110, bbox_inches="tight"); plt.close(fig)
        self.file("png", file.getvalue())

    def show(self, *values, **_):
        for v in values:
            if type(v).__module__.startswith("matplotlib"):
                if hasattr(v, "savefig"): self.figure(v)
                continue
            for kind in ("svg", "jpeg", "png"):
                data = getattr(v, f"_repr_{kind}_", lambda: None)()
                if data: self.file(kind, data[0] if isinstance(data, tuple) else data); break
            else: print(v if isinstance(v, str) else repr(v))


def quickstart(nb="nbs/20_tutorials/01_quickstart.ipynb", folder="runs/quickstart"):
    "Run a notebook's cells one after the other in this process, as its own kernel would; stop at the first error."
    nb, folder = (ROOT/nb).resolve(), (ROOT/folder).resolve()
    if not nb.exists(): sys.exit(f"there is no {os.path.relpath(nb)} yet")
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.path.insert(0, str(ROOT)); folder.mkdir(parents=True, exist_ok=True); os.chdir(nb.parent)
    import builtins, matplotlib.pyplot as plt
    screen, space, start = Terminal(folder), {"__name__": "__main__"}, time.time()
    plt.show, builtins.display = (lambda *_, **__: screen.figures()), screen.show
    try: import IPython.display; IPython.display.display = screen.show
    except ImportError: pass
    for i, c in enumerate(json.loads(nb.read_text(encoding="utf-8"))["cells"]):
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            for line in re.findall(r"^#{1,3} .*", source, re.M): print(f"\n{line.lstrip('# ')}\n{'-' * len(line.lstrip('# '))}", flush=True)
        elif not re.search(r"^#\|\s*(hide\s*$|eval:\s*false|default_exp)", source, re.M): _cell(source, f"{nb.stem}, cell {i}", space, screen)
    print(f"\n{time.time() - start:.0f} s; pictures and files are in {os.path.relpath(folder, ROOT)}/")


def _cell(source, name, space, screen):
    "Run one cell; show what its last line is worth, unless that ends with `;`, and the figures that are still open."
    source = re.sub(r"^[%!].*", "", source, flags=re.M)
    linecache.cache[f"<{name}>"] = (len(source), None, source.splitlines(True), f"<{name}>")
    tree = ast.parse(source, f"<{name}>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, f"<{name}>", "exec"), space)
        value = eval(compile(ast.Expression(last.value), f"<{name}>", "eval"), space) if last is not None else None
    except Exception: traceback.print_exc(); sys.exit(1)
    if value is not None and not source.rstrip().endswith(";"): screen.show(value)
    screen.figures(); sys.stdout.flush()


CSS = """
body{margin:0;display:grid;grid-template-columns:17rem minmax(0,60rem);gap:2rem;font:16px/1.55 system-ui,sans-serif;color:#222}
nav{position:sticky;top:0;height:100vh;overflow:auto;padding:1rem;box-sizing:border-box;background:#f6f7f9;border-right:1px solid #ddd}
nav a{display:block;padding:.15rem .4rem;color:#234;text-decoration:none;border-radius:4px}nav a[aria-current]{background:#dbe6ff}nav h3{margin:.8rem 0 .2rem;font-size:.8rem;text-transform:uppercase;color:#667}
main{padding:1rem 1rem 4rem}img{max-width:100%}pre{overflow-x:auto;margin:0;font-size:.85rem;line-height:1.4}
.jp-InputPrompt,.jp-OutputPrompt,.jp-Collapser,.anchor-link,.jp-InputArea-prompt,.jp-OutputArea-prompt{display:none}
.highlight{background:#f7f7f9;border:1px solid #e3e3e8;border-radius:6px;padding:.5rem .8rem;margin:.6rem 0}blockquote{margin:0;padding-left:1rem;border-left:3px solid #9bb;color:#555}
table{border-collapse:collapse}td,th{border:1px solid #ddd;padding:.2rem .5rem}@media(max-width:50rem){body{display:block}nav{position:static;height:auto}}"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{css}</style></head>
<body><nav>{nav}</nav><main>{body}</main></body></html>"""

if __name__ == "__main__":
    cmd, args = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if cmd == "run":
        for p in [Path(a).resolve() for a in args] or notebooks(): print("run", p.relative_to(ROOT), flush=True); run(p)
    elif cmd in ("text", "write", "export", "clean", "readme", "site", "quickstart"): globals()[cmd](*args)
    else: sys.exit(__doc__)
