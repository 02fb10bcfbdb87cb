"""The command line: help is quick, the core needs no torch, mistakes are one line with their exit code."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from conftest import save_tiny
from tiny_recipe import write_lines

ROWS = [{"instruction": f"question {i}", "input": "", "output": f"answer number {i} of many"} for i in range(20)]
PAIRS = [{"task": "t", "prompt": f"question {i}", "chosen": "a good answer", "rejected": "a bad one"} for i in range(3)]

# A process in which the heavy packages can't be imported: the core install. It has imported all else and forks a child
# for each command line, whose arguments, folder, environment and outputs come as a line of JSON.
CORE = """
import importlib, json, os, pkgutil, sys, traceback
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "datasets", "trl", "peft", "accelerate", "tokenizers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from importlib import util
find = util.find_spec
util.find_spec = lambda name, package=None: None if name in {"torch", "transformers"} else find(name, package)
import keepset
from keepset.cli import main
if len(sys.argv) > 1:
    sys.argv = ["keepset", *sys.argv[1:]]
    main()
for module in pkgutil.walk_packages(keepset.__path__, "keepset."):
    try:
        module.name.endswith("__main__") or importlib.import_module(module.name)
    except ModuleNotFoundError:
        pass
for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["keepset", *request["words"]]
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture
def files(tmp_path):
    for name, rows in (("pool", ROWS), ("target", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def fresh_core(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CORE, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run a command line in a child of the warm process."""
    folder = tmp_path_factory.mktemp("core")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with threads must not fork
    server = subprocess.Popen(
        [sys.executable, "-c", CORE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert server.stdin and server.stdout
    stdin, stdout = server.stdin, server.stdout

    def run(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        outputs = {name: str(folder / name) for name in ("stdout", "stderr")}
        request = {"words": [*map(str, words)], "cwd": str(cwd or Path.cwd()), "env": dict(os.environ), **outputs}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        return subprocess.CompletedProcess(words, code, *(Path(path).read_text() for path in outputs.values()))

    yield run
    stdin.close()
    server.wait(30)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['keepset', '--help']\n"
        "from keepset.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'scipy', 'datasets', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Score every row of a pool" in done.stdout


def test_nothing_of_ray_is_imported_without_the_executor(tmp_path):
    """Only its own module names it, inside a function; a whole `score` on a model leaves it out."""
    import keepset

    source = Path(keepset.__file__).parent
    names = [p.relative_to(source).as_posix() for p in source.rglob("*.py")
             if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)]  # fmt: skip
    assert names == ["runfolder/execute_ray.py"]
    save_tiny(tmp_path / "model", max_position_embeddings=512)
    pool = write_lines(tmp_path / "pool.jsonl", [{"instruction": f"q{i}", "output": "a b"} for i in range(4)])
    code = (
        "import sys, keepset; assert 'ray' not in sys.modules\n"
        f"sys.argv = ['keepset', 'score', 'loss', '--pool', {pool!r}, '--run_dir', {str(tmp_path / 'run')!r},"
        f" '--model_name_or_path', {str(tmp_path / 'model')!r}]\n"
        "from keepset.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' in sys.modules and not {m for m in sys.modules if m.partition('.')[0] == 'ray'}\n"
        "assert 'keepset.runfolder.execute_ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run/scores/loss.parquet").exists(), done.stderr


def test_import_keepset_needs_no_torch_and_offers_its_names():
    code = (
        "import sys, keepset; assert 'numpy' not in sys.modules; keepset.load_pool; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import keepset

    for name in keepset.__all__:
        assert getattr(keepset, name) is not None


@pytest.mark.parametrize("method", ["random", "length", "bm25", "dsir"])
def test_text_methods_score_and_select_in_the_core(core, files, method):
    run = files / "run"
    done = core(
        "score", method, "--pool", files / "pool.jsonl", "--target", files / "target.jsonl", "--run_dir", run, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"file": ""} == {
        "label": method, "rows_in": 20, "scored": 20, "quarantined": 0, "file": ""
    }  # fmt: skip
    done = core("select", method, "--budget", "25%", "--run-dir", run, "--out", files / "out.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 5
    chosen = (files / "out.jsonl").read_text().splitlines()
    assert len(chosen) == 5 and set(chosen) <= {json.dumps(r) for r in ROWS}
    done = core("export", method, files / "out.csv", "--run_dir", run)
    assert done.returncode == 0, done.stderr
    assert (files / "out.csv").read_text().startswith("instruction,input,output\n")
    done = core("export", method, files / "weighted.jsonl", "--run_dir", run, "--weight", "rank")
    assert done.returncode == 0, done.stderr
    weighted = [json.loads(line) for line in (files / "weighted.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "weight"} for row in weighted] == [json.loads(c) for c in chosen]
    assert sum(row["weight"] for row in weighted) == pytest.approx(5)
    assert [row["weight"] for row in weighted] == sorted((row["weight"] for row in weighted), reverse=True)
    for words, told in (
        (["full", "--weight", "rank"], "add --weight_by LABEL"),
        ([method, "--weight", "cubic"], "one of softmax, rank"),
        ([method, "--weight_by", method], "does nothing without --weight"),
        ([method, "--temperature", "2"], "--temperature does nothing without --weight"),
        ([method, "--weight", "softmax", "--temperature", "0"], "must be above 0"),
    ):
        done = core("export", words[0], files / "no.jsonl", "--run_dir", run, *words[1:])
        assert done.returncode == 2 and told in done.stderr and not (files / "no.jsonl").exists()
    done = core("export", "full", files / "all.jsonl", "--run_dir", run, "--weight", "softmax", "--weight_by", method)
    assert done.returncode == 0, done.stderr
    assert sum(json.loads(t)["weight"] for t in (files / "all.jsonl").read_text().splitlines()) == pytest.approx(20)


def test_inspect_explain_and_report_work_in_the_core(core, files):
    run = files / "run"
    assert core("inspect", files / "pool.jsonl", "--json").returncode == 0
    core("score", "bm25", "--pool", files / "pool.jsonl", "--target", files / "target.jsonl", "--run_dir", run)
    core("select", "bm25", "--budget", "5", "--run_dir", run)
    row = json.loads((run / "subsets.json").read_text())["bm25"]["ids"][0]
    done = core("explain", row, "--label", "bm25", "--run_dir", run, "--json")
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr
    done = core("report", "--run_dir", run)
    assert done.returncode == 0 and (run / "report.html").stat().st_size > 10_000, done.stderr


def test_overrides_from_the_report_are_taken(core, files):
    run = files / "run"
    core("score", "random", "--pool", files / "pool.jsonl", "--run_dir", run)
    core("select", "random", "--budget", "5", "--run_dir", run)
    ids = json.loads((run / "subsets.json").read_text())["random"]["ids"]
    import pyarrow.parquet as pq

    last = pq.read_table(run / "scores/random.parquet").sort_by("score")["id"][0].as_py()
    marks = files / "overrides.json"
    marks.write_text(json.dumps({"keep": [last], "drop": [ids[0]]}))
    done = core("select", "random", "--budget", "5", "--overrides", marks, "--run_dir", run)
    assert done.returncode == 0, done.stderr
    again = json.loads((run / "subsets.json").read_text())["random"]["ids"]
    assert again == [last, *ids[1:]]
    marks.write_text(json.dumps({"keep": ["nobody"]}))
    done = core("select", "random", "--budget", "5", "--overrides", marks, "--run_dir", run)
    assert done.returncode == 2 and "id nobody is not in this run's scores" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["score", "bm52", "--pool", "pool.jsonl"], 2, "no method 'bm52' (did you mean 'bm25'?)"),
        (["score", "bm25", "--pool", "pool.jsonl"], 2, "target: this method needs validation rows or pairs"),
        (["score", "davir", "--pool", "pool.jsonl"], 2, "davir runs a model: pip install 'keepset[train]'"),
        (["score", "random", "--pool", "none.jsonl"], 4, "none.jsonl"),
        (["score", "random", "--pool", "empty.jsonl"], 4, "empty.jsonl"),
        (
            ["score", "random", "--pool", "pool.jsonl", "--set", "buget=3"],
            2,
            "unknown key 'buget' (did you mean 'budget'?)",
        ),
        (["score", "random", "-o", "sead=1", "--pool", "pool.jsonl"], 2, "did you mean 'seed'"),
        (["select", "random"], 2, "is no run folder yet; start one with `keepset run` or `keepset score METHOD"),
        (["score", "loss", "--pool", "pool.jsonl", "-o", "form"], 2, "-o 'form': write it as key=value"),
        (["run", "none.yaml"], 2, "none.yaml: no such recipe"),
        (["scor"], 2, "Did you mean 'score'"),
        (["score", "random", "--poll", "x"], 2, "--pool"),
    ],
)
def test_mistakes_are_one_line_with_an_exit_code(core, files, words, code, message):
    (files / "empty.jsonl").write_text("")
    done = core(*words, cwd=files)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_quiet_leaves_results_and_mistakes_and_no_color_is_honoured(core, files, monkeypatch):
    words = ("score", "random", "--pool", files / "pool.jsonl", "--run_dir", files / "run")
    done = fresh_core(*words, "--quiet", "--json")
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["scored"] == 20
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in core("score", "nope", "-q", "--pool", files / "pool.jsonl").stderr
    monkeypatch.setenv("NO_COLOR", "1")
    done = core("score", "nope", "-q", "--pool", files / "pool.jsonl")
    assert done.returncode == 2 and "no method 'nope'" in done.stderr and "\x1b" not in done.stderr


def test_a_wrong_column_is_told_with_the_nearest_one(core, files):
    setting = "pool=[{path: " + str(files / "pool.jsonl") + ", category_column: instrucion}]"
    done = core("score", "random", "--pool", "x", "--set", setting, "--run_dir", files / "run")
    assert done.returncode == 4 and "(did you mean 'instruction'?)" in done.stderr


def test_methods_lists_every_method_with_paper_needs_and_cost(core):
    done = core("methods", "--json")
    found = json.loads(done.stdout)
    from keepset.methods.table import METHODS

    assert [m["name"] for m in found] == list(METHODS)
    assert all(m["formula"] and m["needs"] and m["cost"] for m in found)
    assert "reduce" in json.loads(core("methods", "rose", "--json").stdout)[0]["options"]


def test_every_method_has_a_row_in_readme_and_docs_and_a_file():
    from keepset.methods.table import METHODS

    root = Path(__file__).parents[2]
    for page in ("README.md", "docs/methods.md"):
        cells = [line.split("|")[1] for line in (root / page).read_text().splitlines() if line.startswith("|")]
        missing = set(METHODS) - named_in(cells)
        assert not missing, f"not in the table of {page}: {sorted(missing)}"


def named_in(cells: list[str]) -> set[str]:
    """The methods that first cells of a table name: `a`, **b**, or c (words); a word of a sentence names none."""
    cells = [re.sub(r"[`*]|\(.*\)", "", cell) for cell in cells]
    return {name.strip() for cell in cells for name in cell.split(",")}


def test_a_word_of_a_cell_names_no_method():
    assert named_in([" `davir`, `davir-ref` ", " **rose** ", " grad-norm (GraNd) "]) == {
        "davir", "davir-ref", "rose", "grad-norm",
    }  # fmt: skip
    assert "distinct" not in named_in([" DSIR over the authors' package, 79k distinct rows ", " the distinct "])


def test_every_command_has_help_with_an_example():
    from typer.main import get_command

    from keepset.cli import app

    found = dict(get_command(app).commands)  # type: ignore[attr-defined]
    found |= found.pop("train").commands
    for name, command in found.items():
        assert command.help and "Example: keepset" in command.help, name


def test_init_writes_a_recipe_that_loads(core, files):
    done = core("init", files / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    from keepset.recipe import load_recipe

    assert load_recipe(files / "recipe.yaml").methods
    assert core("init", files / "recipe.yaml").returncode == 2


def test_the_command_page_is_current():
    root = Path(__file__).parents[2]
    page = runpy.run_path(str(root / "docs/make_cli.py"))["page"]()
    assert page == (root / "docs/cli.md").read_text(), "run python docs/make_cli.py"


def test_init_makes_the_folder_it_writes_into(tmp_path, core):
    assert core("init", tmp_path / "new" / "recipe.yaml").returncode == 0
    assert (tmp_path / "new" / "recipe.yaml").is_file()


@pytest.mark.parametrize("kind", ["slurm", "ray", "accelerate"])
def test_init_writes_files_for_several_machines(kind, tmp_path):
    from typer.testing import CliRunner

    from keepset.cli import app

    path = tmp_path / "file"
    done = CliRunner().invoke(app, ["init", str(path), f"--{kind}"])
    assert done.exit_code == 0 and str(path) in done.output
    text = path.read_text()
    assert "ot yet" in text.split("\n#SBATCH")[0][:400]
    if kind == "slurm":
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0 and "\nkeepset work " in text
    else:
        assert isinstance(yaml.safe_load(text), dict)
    assert CliRunner().invoke(app, ["init", str(tmp_path / "b"), "--slurm", "--ray"]).exit_code != 0
