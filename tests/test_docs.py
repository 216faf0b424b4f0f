"""The documentation: every command is run or says what it needs; names, links and tables are right.

A shell block runs, in a folder of its own and on the small model, unless the text before it says what it "needs". Its flags
and variables are checked in any case.
"""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT, load_runner
from forks import python_command

import inferix
import run_compare
from dax.quant.quantization import read_qconfig_dict
from inferix import CausVidPipeline, SelfForcingPipeline
from inferix.cli import arguments, model_paths, preflight
from inferix.cli.main import run
from inferix.cli.presets import PRESETS
from inferix.config import PipelineConfig, load_config
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.pipelines.storyboard import read_storyboard
from inferix.video import wait_for_writers
from inferix.webrtc.server import serve
from inferix.webrtc.session import WebRTCConfig

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "example/quantization/README.md", ROOT / "weights/README.md"]
RUNNERS = {
    "self_forcing_quantized.sh": "run_self_forcing_quantized.py",
    "causvid_quantized.sh": "run_causvid_quantized.py",
    "compare.sh": "run_compare.py",
}
SHORT = {"OUTPUT_FOLDER": "outputs", "NUM_OUTPUT_FRAMES": "3", "NUM_ROLLOUT": "1", "WEBRTC_PORT": "0"}
"""Variables of the runs here, where a command does not set them."""
EXCLUDED = {"NUM_OUTPUT_FRAMES": {"ENDLESS"}, "NUM_ROLLOUT": {"DIFF_PROMPT"}}
"""Variables beside which they may not be set."""
RUN_BY_CI = ("./setup.sh", ".venv/bin/python -m pytest", "./.ci/", "pip install -e .", ".venv/bin/pre-commit install")


class Block(NamedTuple):
    """A fenced block, and the text between it and the heading or block before it."""

    page: str
    code: str
    intro: str

    def __str__(self) -> str:
        return f"{self.page} {self.code[:40]}"


class Command(NamedTuple):
    variables: dict[str, str]
    words: list[str]


def blocks(language: str) -> list[Block]:
    found, fence = [], re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for page in PAGES:
        text, end = page.read_text(), 0
        for block in fence.finditer(text):
            intro = re.split(r"^#+ .*$", text[end : block.start()], flags=re.MULTILINE)[-1]
            found += [Block(str(page.relative_to(ROOT)), block[2], intro)] if block[1] == language else []
            end = block.end()
    return found


def commands(code: str) -> Iterator[Command]:
    """Yield the commands of a shell block."""
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            variables = [word for word in words if re.match(r"[A-Z0-9_]+=", word)]
            if words:
                yield Command(dict(word.split("=", 1) for word in variables), words[len(variables) :])


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after ``heading``, without its header."""
    text = (ROOT / page).read_text().partition(f"\n{heading}\n")[2]
    lines = re.search(r"(^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- commands


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder like a checkout in which nothing was downloaded, as the current one. The small model's clips are short."""
    for name in ("example", "benchmarks", "3rd_party", "weights/demo", "weights/download.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    missing = model_paths.ModelPaths(*[tmp_path / "not downloaded"] * 3)
    monkeypatch.setattr(model_paths, "REAL", dict.fromkeys(model_paths.REAL, missing))
    for name, paths in model_paths.DEMO.items():  # clips of two blocks, 64 pixels wide
        short = tmp_path / paths.config.name
        short.write_text(paths.config.read_text().replace("[1, 21, 16, 16, 16]", "[1, 6, 16, 8, 8]"))
        monkeypatch.setitem(model_paths.DEMO, name, replace(paths, config=short))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_shell(block, project, monkeypatch):
    runs = not re.search(r"\bneeds?\b", block.intro)
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for command in commands(block.code):
        words, line = command.words, " ".join(command.words)
        if Path(words[0]).name in RUNNERS:
            check_script(command, project, runs, monkeypatch)
        elif words[0] == "python":
            parse(Path(words[1]).name, words[2:], monkeypatch)
        elif words[0] == "./weights/download.sh":
            subprocess.run([*words, "--dry-run"], env=environment(), check=True)
        elif words[0] == "cd":
            assert Path(words[1]).is_dir()
        elif "benchmarks/" in line:
            check_benchmark(words)
        else:
            assert line.startswith(RUN_BY_CI) or not runs, f"nothing runs: {line}"


def check_script(command: Command, project: Path, runs: bool, monkeypatch) -> None:
    """Check the variables and flags of a script under example/quantization; with ``runs`` do what they say."""
    script = Path(command.words[0])
    known = script.read_text() + script.with_name("launch.py").read_text()
    unknown = [name for name in command.variables if not re.search(rf"\b{name}\b", known)]
    assert not unknown, f"{script} has no variable {unknown}"
    short = {name: value for name, value in SHORT.items() if not command.variables.keys() & EXCLUDED.get(name, set())}
    flags = flags_of(command, short, project)
    if not runs:
        parse(RUNNERS[script.name], flags, monkeypatch)
    elif "NPROC" in command.variables:
        subprocess.run(command.words, env=environment() | short | command.variables, check=True, timeout=100)
    else:
        name = script.name.removesuffix("_quantized.sh")
        assert run((run_compare if name == "compare.sh" else load_runner(name)).main, flags) == 0
        wait_for_writers()


def environment() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}


def flags_of(command: Command, defaults: dict[str, str], project: Path) -> list[str]:
    """Return the flags that a script passes on."""
    words = python_command(command.words, defaults | command.variables, project)
    runner = RUNNERS[Path(command.words[0]).name]
    return words[next(i for i, word in enumerate(words) if word.endswith(runner)) + 1 :]


def parse(runner: str, flags: list[str], monkeypatch) -> None:
    """Parse the flags of a runner whose files are not there. Raises InputError where it does not know one."""
    monkeypatch.setattr(arguments, "existing_path", Path)
    monkeypatch.setattr(arguments, "apply_preset", lambda args, flag: None)
    monkeypatch.setattr(preflight, "check", lambda args: None)
    if runner == "run_compare.py":
        run_compare.parse_arguments(flags)
    else:
        preflight.parse_arguments(runner.removeprefix("run_").removesuffix("_quantized.py"), flags)


def check_benchmark(words: list[str]) -> None:
    """Check that a benchmark exists and that flags and settings of these names do."""
    program = next(i for i, word in enumerate(words) if "benchmarks/" in word)
    source = "".join(path.read_text() for path in Path("benchmarks").glob("*.py"))
    assert Path(words[program]).is_file()
    missing = [word for word in words[program + 1 :] if not word.isdecimal() and f'"{word}"' not in source]
    assert not missing, f"{words[program]} has no {missing}"


def test_curl_and_the_state(capsys):
    """The commands of docs/streaming.md, against a running server."""
    (block,) = (block for block in blocks("bash") if "curl" in block.code)
    with serve(WebRTCConfig(port=0)) as session:
        session.ready("fp8", 10**6)
        session.begin_clip(None)
        assert next(session.prompts(iter([(0, "A red circle")]))) == "A red circle"
        url = capsys.readouterr().out.split()[-1].rstrip("/")
        states = []
        for command in commands(block.code):
            words = [word.replace("http://127.0.0.1:8000", url) for word in command.words]
            reply = subprocess.run(
                [*words, "--fail", "--silent"], capture_output=True, text=True, check=True, timeout=30
            )
            states.append(yaml.safe_load(reply.stdout))
    assert states[1]["next_prompt"] == "A blue square moves from top to bottom on a gray background"
    assert states[2] == [{"at_block": 0, "prompt": "A red circle"}]
    assert states[3]["status"] == "closing"
    documented = {name for keys, _ in table("docs/streaming.md", "### State") for name in names(keys)}
    assert documented == states[0].keys()


# --- other languages


def test_readme_python(project, capsys):
    """The snippet of the README, as it stands."""
    (block,) = (block for block in blocks("python") if block.page == "README.md")
    exec(block.code, {})
    shapes = capsys.readouterr().out.splitlines()
    assert shapes[:2] == ["torch.Size([1, 9, 3, 128, 128])", "torch.Size([1, 12, 3, 128, 128])"] and len(shapes) == 7


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_names(block):
    """Methods of the pipelines exist and have the parameters that are given by name."""
    classes = {"pipeline": SelfForcingPipeline, "pipeline.pipeline": CausalInferencePipeline}
    classes |= {"SelfForcingPipeline": SelfForcingPipeline, "CausVidPipeline": CausVidPipeline}
    for call in (node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Call)):
        owner, _, method = ast.unparse(call.func).rpartition(".")
        if owner in classes or method in classes:
            function = getattr(classes[owner], method) if owner else classes[method]
            assert {keyword.arg for keyword in call.keywords} <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml(block, tmp_path, self_forcing):
    content = yaml.safe_load(block.code)
    if isinstance(content, list):
        (tmp_path / "story.yaml").write_text(block.code)
        assert len(read_storyboard(tmp_path / "story.yaml", block_size=3).entries) == len(content)
    elif "denoising_step_list" in content:
        (tmp_path / "config.yaml").write_text(block.code)
        assert load_config(tmp_path / "config.yaml").num_frame_per_block == 3
    elif isinstance(content, list):
        (tmp_path / "story.yaml").write_text(block.code)
        assert len(read_storyboard(tmp_path / "story.yaml", 3, num_blocks=7).entries) == len(content)
    else:
        modules = [name for name, _ in self_forcing.transformer.named_modules()]
        assert all(any(f".{name}".endswith(f".{key}") for name in modules) for key in read_qconfig_dict(content) if key)


# --- tables


def test_variables_are_those_of_the_scripts():
    sections = {
        "## Both scripts": ("self_forcing", "causvid"),
        "## Self-Forcing": ("self_forcing",),
        "## CausVid": ("causvid",),
    }
    for script in ("self_forcing", "causvid"):
        text = (ROOT / f"example/quantization/{script}_quantized.sh").read_text()
        rows = [
            row
            for section, scripts in sections.items()
            if script in scripts
            for row in table("docs/variables.md", section)
        ]
        documented = {name: default for variables, default, _ in rows for name in names(variables)}
        assert documented.keys() == set(re.findall(r"--[a-z0-9_]+ \"\$\{?([A-Z0-9_]+)", text))
        defaults = vars(preflight.parse_arguments(script, []))
        for name, default in documented.items():
            value = defaults[name.lower()]
            if value is not None and re.fullmatch(r"`[^`]+`", default) and name != "USE_EMA":
                assert default == f"`{str(value).lower() if isinstance(value, bool) else value}`", name


def test_keys_of_a_config():
    rows = table("docs/variables.md", "## Keys of a config file")
    fields = {name: field.default for name, field in PipelineConfig.__dataclass_fields__.items()}
    assert {names(key)[0] for key, *_ in rows} == fields.keys()
    for key, default, _ in rows:
        value, expected = re.match(r"`([^`]+)`", default), fields[names(key)[0]]
        if value and value[1] not in fields:
            assert yaml.safe_load(value[1]) == (list(expected) if isinstance(expected, tuple) else expected), key


def test_published_models():
    rows = {names(row[0])[0]: row[1:] for row in table("docs/checkpoints.md", "## Published models")}
    assert rows.keys() == PRESETS.keys()
    for name, (script, *_, config, _, licence) in rows.items():
        preset = PRESETS[name]
        assert (script, names(config), licence) == (preset.script, [preset.config], preset.licence)


def test_imports_point_down_the_list():
    """docs/architecture.md, "The tree"."""
    order = [
        names(cell)[0].strip("/").removesuffix(".py").replace("/", ".")
        for cell, _ in table("docs/architecture.md", "## The tree")
    ]
    order = [name for name in order if name.startswith("inferix.")]
    for path in ROOT.glob("inferix/*/*.py"):
        layer = order.index(f"inferix.{path.parent.name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("inferix."):
                target = ".".join(node.module.split(".")[:2])
                assert order.index(target) >= layer, f"{path} imports {node.module}"


# --- the pages themselves


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)]*))?\)", page.read_text()):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}#{anchor}"


def test_readme_is_short_and_lists_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert all(f"({page.relative_to(ROOT)})" in text for page in PAGES[1:])


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "inferix.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", inferix.__version__)
    assert (ROOT / "inferix/py.typed").exists()
